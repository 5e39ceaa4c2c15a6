"""What the user sees while a run works: progress, and lines and columns of text."""

import math
import sys
import time
from typing import Any

from tqdm import tqdm

from sdpo import distributed
from sdpo.metrics import Entry

SECONDS_BETWEEN_LINES = 30  # at least, of progress without a terminal
SECONDS_WITHOUT_NEWS = 120  # after which a line says that nothing has ended
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
STEP_MEASURES = ("lab/gold", "preference/reward_accuracy_initial", "preference/ranking_accuracy")  # best one first


class Progress(tqdm):
    """Progress of rank 0 on stderr: on a terminal a bar, after two seconds, elsewhere a plain line now and then.

    Both show the units and tokens per second, the time left, and what `show` was given. The rates are averages over
    the time since the start, without the first `done` units.
    """

    monitor_interval = 0  # tqdm's monitor is a thread, and a sweep forks its runs from a process with one thread

    def __init__(self, total: int, description: str, unit: str = "pairs", done: int = 0):
        self._stream, quiet = sys.stderr, not distributed.is_main()
        self._prints_lines = not (quiet or self._stream.isatty())
        self._description, self._unit, self._done = description, unit, done
        self._tokens, self._note = 0, ""
        self._began = self._printed = time.monotonic()
        super().__init__(
            total=total,
            desc=description,
            unit=f" {unit}",
            initial=done,
            delay=2,
            leave=False,
            miniters=1,
            smoothing=0,
            dynamic_ncols=True,
            bar_format=BAR,
            disable=quiet or None,  # None: only on a terminal
        )

    def advance(self, count: int, tokens: int = 0) -> None:
        """Count `count` more units, which hold `tokens` tokens."""
        self._tokens += tokens
        self.update(count)

    def update(self, n: float | None = 1) -> bool | None:
        """Count `n` more units, and print a line if it is time for one."""
        if self._prints_lines:
            self.n += n or 0  # tqdm counts only if it draws a bar
            self._print_after(SECONDS_BETWEEN_LINES)
        return super().update(n)

    def wait(self) -> None:
        """Show that time passes while no unit ends; called about every second."""
        self.refresh()
        if self._prints_lines:
            self._print_after(SECONDS_WITHOUT_NEWS)

    def _print_after(self, seconds: float) -> None:
        if time.monotonic() - self._printed >= seconds:
            self._printed = time.monotonic()
            print(self._line(self._printed - self._began), file=self._stream, flush=True)

    def show(self, note: str) -> None:
        """Show `note`, such as "loss 0.61", beside the rates from the next update on."""
        self._note = note

    def _line(self, seconds: float) -> str:
        done = self.n - self._done
        left = tqdm.format_interval((self.total - self.n) * seconds / done) if done else "?"
        count = f"{self._description}: {self.n} of {self.total} {self._unit}"
        return ", ".join([count, *self._facts(seconds), f"{left} left"])

    def _facts(self, seconds: float) -> list[str]:
        done, facts = self.n - self._done, []
        if done and seconds:
            slow = done / seconds < 0.1
            facts = [f"{seconds / done:.0f} s each" if slow else f"{number(done / seconds)} {self._unit}/s"]
        if self._tokens and seconds:
            facts.append(f"{self._tokens / seconds:,.0f} tokens/s")
        return facts + [self._note] * bool(self._note)

    @property
    def format_dict(self) -> dict[str, Any]:
        """What tqdm draws: its own numbers and the facts."""
        fields = super().format_dict
        return fields | {"postfix": ", ".join(self._facts(fields["elapsed"]))}


def tell(line: str) -> None:
    """Print a line on stderr, above any bar; only rank 0 prints."""
    if distributed.is_main():
        tqdm.write(line, file=sys.stderr)


def step_line(step: Entry) -> str:
    """Return one step of summary.json as a line for the terminal."""
    parts = [
        f"step {step['t']}",
        f"{step['num_pairs']} pairs of {', '.join(step['sources'])}",
        f"loss {' -> '.join(dict.fromkeys(number(step[which]) for which in ('first_loss', 'last_loss')))}",
        f"gamma_ref {number(step['gamma_ref_mean'])}",
        f"{number(step['tokens_per_second'])} tokens/s",
    ]
    if step["utilisation"]:
        parts[-1] += f" at {step['utilisation']:.0%} of the peak"
    if step["reused"]:
        parts[-1] = f"found in the store, trained at {parts[-1]}"
    if (step["runs_on_gpu"] or 1) > 1:
        parts[-1] += f" beside {step['runs_on_gpu'] - 1} other runs on the GPU"
    measures = [name for name in STEP_MEASURES if name in step["eval"]][:1]
    suites = {name.partition("/")[0]: name for name in reversed(step["eval"])}  # each with its first measure
    measures += [name for suite, name in sorted(suites.items()) if suite not in ("lab", "preference")]
    for measure in measures:
        value, low, high = (number(step["eval"][measure][part]) for part in ("value", "low", "high"))
        parts.append(f"{measure} {value} [{low}, {high}]")
    return "  ".join(parts)


def number(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """A number with four significant digits, then its interval in brackets if it has one; a dash for None and nan."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.4g}" if low is None or high is None else f"{value:.4g} [{low:.4g}, {high:.4g}]"


def columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Return rows of cells as lines in which every column is as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
