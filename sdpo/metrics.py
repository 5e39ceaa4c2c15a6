"""What a run tells: metrics.jsonl with its W&B mirror, progress bars, a line per step, whole JSON files.

metrics.jsonl is the truth: every number is written there first, and W&B only repeats it. A run started again
logs every step anew, finished ones from their artifacts, so both begin empty. Only this file of sdpo/ imports wandb.
"""

import dataclasses
import json
import math
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from sdpo.config import Config
from sdpo.launch import local as launch

Entry = dict[str, Any]

RULERS = ("lab/gold", "preference/reward_accuracy_initial", "preference/ranking_accuracy")
OUTCOME = ("seconds", "trained_steps", "reused_steps")  # of summary.json
OTHER_RUNS = ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_SWEEP_ID")  # would merge this run into another one


class Recorder:
    """The metrics of one run. As a context manager it records a run that ends in an exception as failed."""

    def __init__(self, folder: Path, config: Config, *, arm: str, choices: dict[str, str], sweep: str | None = None):
        """`choices` are the run's options by axis. Raises ValueError where W&B cannot start."""
        folder.mkdir(parents=True, exist_ok=True)
        self._mirror = _Mirror(folder, config, {"arm": arm, "choices": choices}, sweep) if config.record.wandb else None
        self._lines = (folder / "metrics.jsonl").open("w", encoding="utf-8")

    def log(self, entry: Entry) -> None:
        """Write an entry of kind `train`, `step`, `eval` or `answers` as one line; ValueError if not finite."""
        flat = flatten(entry)
        bad = [name for name, value in flat.items() if isinstance(value, float) and not math.isfinite(value)]
        if bad:
            where = f"step {entry['t']}" + (f", update {entry['update']}" if "update" in entry else "")
            raise ValueError(f"{where}: {', '.join(bad)} is not finite; what is undefined is recorded as null")
        self._lines.write(json.dumps(entry, allow_nan=False) + "\n")
        self._lines.flush()
        if self._mirror:
            self._mirror.log(entry, flat)

    def conclude(self, manifest: Entry, summary: Entry) -> None:
        """Mirror what else a table of runs needs: the manifest as configuration, the outcome as W&B's summary."""
        if self._mirror:
            self._mirror.conclude(manifest, summary)

    def finish(self, exit_code: int) -> None:
        """Close the run; any exit code but 0 shows it as failed."""
        self._lines.close()
        if self._mirror:
            self._mirror.finish(exit_code)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_) -> None:
        self.finish(0 if error_type is None else 1)


def flatten(entry: Entry) -> dict[str, Any]:
    """An entry under W&B's names: `train/loss`, `step/sources/orca`, `eval/lab/gold`, `eval/lab/gold/low`.

    Measures stand under their own name, with their interval below it; `t` and `update` are axes and stay out.
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


class _Mirror:
    """One W&B run that repeats the metrics of one run folder."""

    def __init__(self, folder: Path, config: Config, names: Entry, sweep: str | None):
        for name in OTHER_RUNS:
            os.environ.pop(name, None)
        import wandb  # here, because it takes a second and most runs do without

        online = config.record.mode == "online"
        if online and not wandb.login(prompt=False):
            raise ValueError(
                "record.mode=online finds no W&B credentials: set WANDB_API_KEY or run `wandb login` "
                "(and leave WANDB_MODE unset), or keep record.mode=offline and upload later with `wandb sync`"
            )
        try:
            self._run = wandb.init(
                project=config.record.project,
                dir=folder,
                id=_replace_mirror(folder / "wandb"),
                name=folder.name,
                group=sweep,
                tags=[f"{axis}={choice}"[:64] for axis, choice in names["choices"].items()],  # 64: W&B's limit
                config=dataclasses.asdict(config) | names,
                mode="online" if online else "offline",
                reinit="create_new",
                settings=_silent(wandb.Settings),
            )
        except wandb.Error as error:
            raise ValueError(f"W&B does not start: {error}; record.mode=offline needs no network") from error
        self._updates: dict[int, int] = {}  # step -> its updates so far
        self._answers: dict[tuple, dict[str, str]] = {}  # (prompt id, turn) -> what was said
        self._run.define_metric("train/*", step_metric="updates")
        self._run.define_metric("step/*", step_metric="t")
        self._run.define_metric("eval/*", step_metric="t")

    def log(self, entry: Entry, flat: dict[str, Any]) -> None:
        if entry["kind"] == "train":
            self._updates[entry["t"]] = entry["update"]
        if entry["kind"] == "answers":
            flat = {"answers": self._side_by_side(entry)}
        axes = {"t": entry["t"], "updates": sum(self._updates.values())}  # neither ever goes back
        self._run.log(axes | {name: value for name, value in flat.items() if value is not None})

    def _side_by_side(self, entry: Entry):
        """All answers so far as a table: a row per prompt and turn, a column per model."""
        import wandb

        for row in entry["answers"]:
            for turn, (question, answer) in enumerate(zip(row["turns"], row["answers"], strict=True), 1):
                line = self._answers.setdefault((row["id"], turn), {"id": str(row["id"]), "prompt": question})
                line[f"M_{entry['t']}"] = answer
        columns = list(dict.fromkeys(name for line in self._answers.values() for name in line))
        rows = [[line.get(name) for name in columns] for line in self._answers.values()]
        return wandb.Table(columns=columns, data=rows)

    def conclude(self, manifest: Entry, summary: Entry) -> None:
        self._run.config.update({"manifest": manifest})
        headline = {"headline": summary["headline"]["value"]}
        headline |= {f"headline_{name}": summary["headline"][name] for name in ("name", "n")}
        self._run.summary.update(headline | {name: summary[name] for name in OUTCOME})

    def finish(self, exit_code: int) -> None:
        import wandb

        self._run.finish(exit_code=exit_code)
        wandb.teardown()  # waits for its service, which writes the last records after `finish` has returned


def _replace_mirror(folder: Path) -> str:
    """Remove the mirror of an earlier attempt and return this run's id, which the next attempt takes over.

    W&B replaces what it holds under an id when a run starts under it, so a run stays one run there too.
    """
    folder.mkdir(exist_ok=True)
    for earlier in folder.glob("*run-*"):
        shutil.rmtree(earlier)
    name = folder / "id"
    if not name.is_file():
        name.write_text(uuid.uuid4().hex)
    return name.read_text()


def _silent(settings: type) -> Any:
    """W&B without console output or capture, links, code, git state, host name and machine statistics."""
    return settings(
        silent=True,
        console="off",
        symlink=False,
        disable_git=True,
        disable_code=True,
        save_code=False,
        host="",
        finish_timeout=600,  # seconds; a lost network does not hold a run whose numbers are on disk
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )


class Progress(tqdm):
    """A bar with pairs/s, tokens/s and the time left."""

    monitor_interval = 0  # tqdm's monitor is a thread, and arms are forked from a parent that has none
    tokens = 0

    def advance(self, count: int, tokens: int = 0) -> None:
        """Move on by `count` units that held `tokens` tokens."""
        self.tokens += tokens
        self.update(count)

    @property
    def format_dict(self) -> dict[str, Any]:
        fields = super().format_dict
        if self.tokens:
            fields["postfix"] = f"{self.tokens / fields['elapsed']:,.0f} tokens/s"
        return fields


def progress(total: int, description: str, unit: str = "pairs", quiet: bool = False) -> Progress:
    """A bar on stderr for what takes over two seconds; none where stderr is no terminal, or if `quiet`."""
    return Progress(
        total=total,
        desc=description,
        unit=f" {unit}",
        delay=2,
        leave=False,
        miniters=1,
        dynamic_ncols=True,
        disable=quiet or None,  # None: shown on a terminal only
    )


def tell(line: str) -> None:
    """One line on stderr, above any bar; said by one rank."""
    if launch.is_main():
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


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that readers see whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
