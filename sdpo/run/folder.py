"""A run and its folder: names, settings, whether the run is finished, how it failed. Imports no torch."""

import hashlib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

from omegaconf import DictConfig, OmegaConf

from sdpo import config as configuration
from sdpo.config import Config
from sdpo.errors import UserError, of_disk, one_line
from sdpo.store import artifacts as store
from sdpo.store.artifacts import try_lock

LOCK = ".lock"  # a file in the run folder, locked by the process that executes the run
OF_REFUSED = {LOCK, "config.yaml", "manifest.json", "metrics.jsonl", "error.txt", "wandb"}  # what a refused run leaves
# Settings that name files or folders.
INPUTS = ("path", "train", "held_out", "local", "file", "files", "pairs", "protocol", "references", "opponent")
NAMED_AXES = ("model", "arm", "split", "reference", "loss")  # their options form the name of a run folder


class Run(NamedTuple):
    """One run: its configuration, its folder, and the names under which tables and figures list it."""

    config: Config
    folder: Path
    choices: dict[str, str]  # axis -> option
    arm: str  # its label in a sweep; runs that differ only in the seed share it
    sweep: str | None = None

    @classmethod
    def from_composed(
        cls, job: DictConfig, hydra: DictConfig, folder: Path, arm: str = "", sweep: str | None = None
    ) -> Self:
        """The run that Hydra composed. Raises UserError if its configuration is invalid."""
        choices = _choices(hydra)
        return cls(configuration.from_composed(job), folder, choices, arm or "-".join(_axes(choices)), sweep)

    def prepare(self) -> None:
        """Write config.yaml, and manifest.json with the names alone; delete the outcome of an earlier run.

        If another process is executing a run in this folder, nothing is changed. Raises UserError if that run has
        other settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOCK).open("w") as file:
            if try_lock(file):
                self._write()
            elif (self.folder / "config.yaml").read_text() != configuration.to_yaml(self.config):
                raise UserError(f"{self.folder}: another process runs other settings there; name another folder")

    def withdraw(self) -> None:
        """Delete the folder of a run that was refused before it recorded anything; any other one stays as it is."""
        found = {path.name for path in self.folder.iterdir()}
        recorded = self.folder / "metrics.jsonl"
        if found <= OF_REFUSED and not (recorded.is_file() and recorded.stat().st_size):
            shutil.rmtree(self.folder)

    def _write(self) -> None:
        for leftover in [self.folder / "done", self.folder / "error.txt", *self.folder.glob("log*.txt")]:
            leftover.unlink(missing_ok=True)
        (self.folder / "config.yaml").write_text(configuration.to_yaml(self.config))
        names = {
            "run": self.folder.name,
            "sweep": self.sweep,
            "arm": self.arm,
            "choices": self.choices,
            "seed": self.config.seed,
            "command": sys.argv,
        }
        (self.folder / "manifest.json").write_text(json.dumps(names, indent=1))

    @property
    def finished(self) -> bool:
        """Whether the run ended with the present settings, numerics and input files, and all its models still exist."""
        done, steps = self.folder / "done", self.folder.glob("steps/*")
        return done.is_file() and done.read_text() == stamp(self.config) and all(step.exists() for step in steps)

    @property
    def error(self) -> str | None:
        return failure(self.folder)


def without_hydra(composed: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])


def run_name(*, _root_: DictConfig) -> str:
    """The resolver ${run_name:}: options, seed, short hash of all settings: lab-by_source-previous-dpo-s0-1f2e3d."""
    settings = cast(dict[str, Any], OmegaConf.to_container(without_hydra(_root_), resolve=True)) | {"plan": False}
    axes = _axes(_choices(_root_.hydra))
    return "-".join([*axes, f"s{settings['seed']}", _hash(json.dumps(settings, sort_keys=True))[:6]])


def sweep_name(*, _root_: DictConfig) -> str:
    """The resolver ${sweep_name:}: the experiment or the swept keys, and a short hash of any other overrides."""
    from hydra.core.override_parser.overrides_parser import OverridesParser  # imported here: ranks never import Hydra

    no_result = ("experiment=", "plan=", "hydra.", "hydra/")  # overrides that change no result and stay out of the hash
    overrides = [o for o in _root_.hydra.overrides.task if not o.lstrip("+~").startswith(no_result)]
    experiment = _root_.hydra.runtime.choices.get("experiment")
    swept = [o.get_key_element() for o in OverridesParser.create().parse_overrides(overrides) if o.is_sweep_override()]
    parts = [experiment] if experiment else swept
    if overrides:
        parts.append(_hash("\n".join(sorted(overrides)))[:6])
    return "-".join(parts or ["sweep"]).replace("/", "_")


def labels(jobs: Sequence[Sequence[str]]) -> list[str]:
    """One label for each job's overrides: its `arm` (without folders), and every other key but `seed` that varies."""
    settings = [dict(override.lstrip("+").partition("=")[::2] for override in job) for job in jobs]
    keys = dict.fromkeys(key for job in settings for key in job if key != "seed")
    varying = [key for key in keys if key == "arm" or len({job.get(key) for job in settings}) > 1]
    return [
        " ".join(base_name(job[key]) if key == "arm" else f"{key}={job[key]}" for key in varying) for job in settings
    ]


def finish(folder: Path, stamp_at_start: str) -> None:
    """Mark the folder as holding the finished run of what was stamped when it began."""
    (folder / "done").write_text(stamp_at_start)


def fail(folder: Path, error: BaseException) -> None:
    """Write an error's sentence and traceback to error.txt. Only the first of several ranks to fail writes it."""
    known = error if isinstance(error, UserError) else of_disk(error)
    sentence = one_line(known) if known else f"{type(error).__name__}: {one_line(error)}"
    with suppress(OSError), (folder / "error.txt").open("x") as file:  # it exists, or the disk is full
        file.write(f"{sentence}\n\n{''.join(traceback.format_exception(error))}")


def failure(folder: Path) -> str | None:
    """The sentence of the error that ended the run; None if no error did."""
    path = folder / "error.txt"
    if not path.is_file():
        return None
    lines = path.read_text().splitlines()
    return lines[0] if lines else "the run failed, but its error could not be written: the disk may be full"


def stamp(config: Config) -> str:
    """Hash of the settings, the numerics version, and the size and modification time of every input file."""
    files = [file for path in _paths(asdict(config)) for file in (path.rglob("*") if path.is_dir() else [path])]
    states = sorted((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file())
    return _hash(repr((configuration.to_yaml(config), store.NUMERICS_VERSION, states)))


def _paths(settings: dict) -> Iterator[Path]:
    """Every file and folder that the settings name, without the split that may follow a folder."""
    for key, value in settings.items():
        if key == "held_out_sets":
            yield from (path for names in value.values() for path in _paths({"held_out": names}))
        elif isinstance(value, dict):
            yield from _paths(value)
        elif key in INPUTS and value and isinstance(value, str | list):
            for name in [value] if isinstance(value, str) else value:
                yield Path(name) if Path(name).exists() else Path(name.rpartition(":")[0] or name)


def _choices(hydra: DictConfig) -> dict[str, str]:
    """The option chosen on every axis of conf/; Hydra's own groups are left out."""
    return {str(axis): str(option) for axis, option in hydra.runtime.choices.items() if option and "/" not in axis}


def _axes(choices: dict[str, str]) -> list[str]:
    return [base_name(choices[axis]) for axis in NAMED_AXES if axis in choices]


def base_name(option: str) -> str:
    """An option without its folders: factorial/easy_moving_chained -> easy_moving_chained."""
    return option.rpartition("/")[2]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically: a reader finds the whole file or no file."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
