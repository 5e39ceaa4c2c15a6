"""metrics.jsonl: every number of a run, one JSON object a line.

A number is written here first, and W&B repeats it. A run that is started again logs all its steps again, finished ones
from their artifacts, so the file always starts empty.
"""

import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

from sdpo.errors import UserError

Entry = dict[str, Any]
TRL_OF_REFERENCE = (
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/ref_chosen", "logps/ref_rejected"),  # TRL does not log these two
)
OUTCOME = ("seconds", "trained_steps", "reused_steps")  # keys of summary.json

PARTS = ("load", "reference", "updates", "evaluation", "save", "hash", "wait")  # where a run's seconds go


class Clock:
    """Counts the seconds that this process spends on each of PARTS; of nested parts the inner one counts.

    `reference` are all passes for log-probs outside the updates. What threads do beside the main one does not count.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Count from zero."""
        self.seconds, self._inside, self._since = dict.fromkeys(PARTS, 0.0), list[str](), time.monotonic()

    @contextmanager
    def counting(self, part: str) -> Iterator[None]:
        """Context whose seconds are those of a part."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._turn()
        self._inside.append(part)
        try:
            yield
        finally:
            self._turn()
            self._inside.pop()

    def _turn(self) -> None:
        now = time.monotonic()
        if self._inside:
            self.seconds[self._inside[-1]] += now - self._since
        self._since = now


CLOCK = Clock()  # of this process: a run has it for itself


class Mirror(Protocol):
    """A copy of the metrics elsewhere; see sdpo.wandb_mirror."""

    def log(self, entry: Entry, flat: Entry) -> None: ...

    def conclude(self, manifest: Entry, summary: Entry) -> None: ...

    def finish(self, exit_code: int) -> None: ...


class Recorder:
    """Writes the metrics of one run. As a context manager it marks the run as failed if an exception ends it."""

    def __init__(self, folder: Path, mirror: Mirror | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self._mirror = mirror
        self._lines = (folder / "metrics.jsonl").open("w", encoding="utf-8")

    def log(self, entry: Entry) -> None:
        """Write an entry of kind `train`, `step`, `eval` or `answers` as one line.

        Raises UserError if one of its numbers is not finite.
        """
        flat = flatten(entry)
        bad = [name for name, value in flat.items() if isinstance(value, float) and not math.isfinite(value)]
        if bad:
            where = f"step {entry['t']}" + (f", update {entry['update']}" if "update" in entry else "")
            raise UserError(f"{where}: {', '.join(bad)} is not finite; an undefined number is recorded as null")
        self._lines.write(json.dumps(entry, allow_nan=False) + "\n")
        self._lines.flush()
        if self._mirror:
            self._mirror.log(entry, flat)

    def conclude(self, manifest: Entry, summary: Entry) -> None:
        """Give the mirror what a table of runs shows: the manifest and the outcome."""
        if self._mirror:
            self._mirror.conclude(manifest, summary)

    def finish(self, exit_code: int) -> None:
        """Close the files; an exit code other than 0 marks the run as failed."""
        self._lines.close()
        if self._mirror:
            self._mirror.finish(exit_code)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.finish(0 if error_type is None else 1)


def under_trl_names(means: Entry, beta: float | None) -> Entry:
    """What TRL's DPOTrainer (1.16) logs of an update, under its names, and the mean log-probs of the reference.

    `means` are means over the update's pairs. The loss has no `beta` if it reads no reference: then there are no
    rewards. TRL counts a tie as wrong.
    """
    logps = {"logps/chosen": means["chosen_logp"], "logps/rejected": means["rejected_logp"]}
    if beta is None:
        return logps | dict.fromkeys(TRL_OF_REFERENCE)
    chosen, rejected = means["ref_chosen_logp"], means["ref_rejected_logp"]
    rewards = (beta * (means["chosen_logp"] - chosen), beta * (means["rejected_logp"] - rejected))
    values = (*rewards, beta * means["margin"], means["above_share"], chosen, rejected)
    return logps | dict(zip(TRL_OF_REFERENCE, values, strict=True))


def flatten(entry: Entry) -> dict[str, Any]:
    """Return an entry by W&B's names: `train/loss`, `step/sources/orca`, `eval/lab/gold`, `eval/lab/gold/low`.

    A measure's value has the measure's own name, and its interval the names below it. `t` and `update` are axes and
    are left out.
    """
    kind = entry["kind"]
    rest = {name: value for name, value in entry.items() if name not in ("kind", "t", "update")}
    return dict(_leaves(kind, rest.get(kind, rest)))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from _leaves(name if key == "value" else f"{name}/{key}", inner)
