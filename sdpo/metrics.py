"""metrics.jsonl: every number of a run, one JSON object a line.

A number is written here first, and W&B repeats it. A run that is started again logs all its steps again, finished ones
from their artifacts, so the file always starts empty.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, Self

from sdpo.errors import UserError

Entry = dict[str, Any]
OUTCOME = ("seconds", "trained_steps", "reused_steps")  # keys of summary.json


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
