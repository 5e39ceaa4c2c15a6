"""What a person sees while a run works: bars, lines and columns of text."""

import sys
import time
from typing import Any

from tqdm import tqdm

from sdpo import distributed
from sdpo.metrics import Entry

SECONDS_BETWEEN_LINES = 30  # that say how far a run is, without a terminal
RULERS = ("lab/gold", "preference/reward_accuracy_initial", "preference/ranking_accuracy")


class Progress(tqdm):
    """A bar with pairs/s, tokens/s and the time left; without a terminal a plain line now and then."""

    monitor_interval = 0  # tqdm's monitor is a thread, and arms are forked from a parent that has none

    def __init__(self, total: int, description: str, unit: str, quiet: bool):
        self.tokens, self.done, self.said = 0, 0, ""
        self.began = self.told = time.monotonic()
        self.writes_lines = not (quiet or sys.stderr.isatty())
        super().__init__(
            total=total,
            desc=description,
            unit=f" {unit}",
            delay=2,
            leave=False,
            miniters=1,
            dynamic_ncols=True,
            disable=quiet or None,  # None: drawn on a terminal only
        )

    def advance(self, count: int, tokens: int = 0) -> None:
        """Move on by `count` units that held `tokens` tokens."""
        self.tokens += tokens
        self.done += count
        self.update(count)
        if self.writes_lines and time.monotonic() - self.told >= SECONDS_BETWEEN_LINES:
            self.told = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def show(self, said: str) -> None:
        """Let the bar say something besides its rates, as "loss 0.61"."""
        self.said = said

    def _line(self) -> str:
        seconds = time.monotonic() - self.began
        left = seconds / self.done * (self.total - self.done) / 60
        parts = [f"{self.desc}: {self.done} of {self.total}{self.unit}", *self._facts(seconds), f"{left:.0f} min left"]
        return ", ".join(parts)

    def _facts(self, seconds: float) -> list[str]:
        rate = [f"{self.tokens / seconds:,.0f} tokens/s"] if self.tokens else []
        return [self.said] * bool(self.said) + rate

    @property
    def format_dict(self) -> dict[str, Any]:
        fields = super().format_dict
        if facts := self._facts(fields["elapsed"] or 1.0):
            fields["postfix"] = ", ".join(facts)
        return fields


def progress(total: int, description: str, unit: str = "pairs", quiet: bool = False) -> Progress:
    """Progress on stderr for what takes over two seconds; none if `quiet`."""
    return Progress(total, description, unit, quiet)


def tell(line: str) -> None:
    """One line on stderr, above any bar; said by one rank."""
    if distributed.is_main():
        tqdm.write(line, file=sys.stderr)


def step_line(step: Entry) -> str:
    """One step of summary.json as one line for the terminal."""
    parts = [
        f"step {step['t']}",
        f"{step['num_pairs']} pairs of {', '.join(step['sources'])}",
        f"loss {number(step['first_loss'])} -> {number(step['last_loss'])}",
        f"gamma_ref {number(step['gamma_ref_mean'])}",
        f"{number(step['tokens_per_second'])} tokens/s",
    ]
    if step["utilisation"]:
        parts[-1] += f" at {step['utilisation']:.0%} of the peak"
    ruler = next((name for name in RULERS if name in step["eval"]), None)
    if ruler:
        value, low, high = (number(step["eval"][ruler][part]) for part in ("value", "low", "high"))
        parts.append(f"{ruler} {value} [{low}, {high}]")
    return "  ".join(parts)


def number(value: float | None) -> str:
    """A number for people: four digits, or a dash for none."""
    return "-" if value is None else f"{value:.4g}"


def columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of text as lines in which every column is as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
