"""A run from outside: its settings and folder, whether it is finished, how it failed. Nothing here imports torch."""

import fcntl
import hashlib
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from sdpo import config as configuration
from sdpo import store
from sdpo.config import Config
from sdpo.errors import UserError, one_line

LOCK = ".lock"  # in a run folder: held by the process that does the run
NAMED_AXES = ("model", "arm", "split", "reference", "loss")  # the choices in the name of a run folder


def is_taken(lock: IO) -> bool:
    """Whether another process holds this lock; if none does, it is ours until the file is closed."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


class Run(NamedTuple):
    """One run of one configuration, with the names that later tell it from other runs."""

    config: Config
    folder: Path
    choices: dict[str, str]  # axis -> option
    arm: str  # what it is called in a sweep, the same for all its seeds
    sweep: str | None = None

    def prepare(self) -> None:
        """Make the folder ready: the resolved configuration, and the names as the beginning of the manifest.

        A run that another process does meanwhile is left as it is; UserError where that one has other settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOCK).open("w") as file:
            if not is_taken(file):
                self._write()
            elif (self.folder / "config.yaml").read_text() != configuration.to_yaml(self.config):
                raise UserError(f"{self.folder}: another process does a run of other settings there; name another")

    def _write(self) -> None:
        for leftover in ("done", "error.txt", "log.txt"):
            (self.folder / leftover).unlink(missing_ok=True)
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
        """Whether the folder holds this very run, of these settings, numerics and input files, with all its models."""
        done, steps = self.folder / "done", self.folder.glob("steps/*")
        return done.is_file() and done.read_text() == _stamp(self.config) and all(step.exists() for step in steps)

    @property
    def error(self) -> str | None:
        return failure(self.folder)


def of(job: DictConfig, hydra: DictConfig, folder: Path, arm: str = "", sweep: str | None = None) -> Run:
    """The run that Hydra composed. UserError where the configuration is not a valid one."""
    choices = {axis: str(option) for axis, option in hydra.runtime.choices.items() if option and "/" not in axis}
    return Run(configuration.from_composed(job), folder, choices, arm or "-".join(_axes(choices)), sweep)


def without_hydra(composed: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])


def run_name(*, _root_: DictConfig) -> str:
    """The resolver ${run_name:}: choices, seed, short hash of all settings: lab-by_source-previous-dpo-s0-1f2e3d."""
    settings = OmegaConf.to_container(without_hydra(_root_), resolve=True) | {"plan": False}
    axes = _axes(_root_.hydra.runtime.choices)
    return "-".join([*axes, f"s{settings['seed']}", _hash(json.dumps(settings, sort_keys=True))[:6]])


def sweep_name(*, _root_: DictConfig) -> str:
    """The resolver ${sweep_name:}: the experiment, or the swept keys; and a short hash of all that is overridden."""
    from hydra.core.override_parser.overrides_parser import OverridesParser  # here, because ranks do without Hydra

    names_only = ("experiment=", "plan=", "hydra.", "hydra/")  # of these nothing depends but how runs are done
    overrides = [o for o in _root_.hydra.overrides.task if not o.lstrip("+~").startswith(names_only)]
    experiment = _root_.hydra.runtime.choices.get("experiment")
    swept = [o.get_key_element() for o in OverridesParser.create().parse_overrides(overrides) if o.is_sweep_override()]
    parts = [experiment] if experiment else swept
    if overrides:
        parts.append(_hash("\n".join(sorted(overrides)))[:6])
    return "-".join(parts or ["sweep"]).replace("/", "_")


def labels(jobs: Sequence[Sequence[str]]) -> list[str]:
    """For each job's overrides its label: its `arm`, without the arm's folder, and what varies but the seed."""
    settings = [dict(override.lstrip("+").partition("=")[::2] for override in job) for job in jobs]
    keys = dict.fromkeys(key for job in settings for key in job if key != "seed")
    varying = [key for key in keys if key == "arm" or len({job.get(key) for job in settings}) > 1]
    return [
        " ".join(base_name(job[key]) if key == "arm" else f"{key}={job[key]}" for key in varying) for job in settings
    ]


def finish(config: Config, folder: Path) -> None:
    """Mark the folder as holding the whole run of this configuration."""
    (folder / "done").write_text(_stamp(config))


def fail(folder: Path, error: BaseException) -> None:
    """Keep an error in error.txt, its sentence first; of several ranks the first to fail knows the cause."""
    sentence = one_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
    with suppress(FileExistsError), (folder / "error.txt").open("x") as file:
        file.write(f"{sentence}\n\n{''.join(traceback.format_exception(error))}")


def failure(folder: Path) -> str | None:
    """The sentence of the error that ended the run, where one did."""
    path = folder / "error.txt"
    return path.read_text().splitlines()[0] if path.is_file() else None


def _stamp(config: Config) -> str:
    """A hash of all that a finished run stands for; files and folders enter with their sizes and times of change."""
    files = [file for path in _paths(asdict(config)) for file in (path.iterdir() if path.is_dir() else [path])]
    states = sorted((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file())
    return _hash(repr((configuration.to_yaml(config), store.NUMERICS_VERSION, states)))


def _paths(settings: dict) -> Iterator[Path]:
    """All files and folders that the settings name."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _paths(value)
        elif key in ("path", "train", "held_out", "local", "file") and value:
            yield from map(Path, [value] if isinstance(value, str) else value)


def _axes(choices: DictConfig | dict[str, str]) -> list[str]:
    return [base_name(choices[axis]) for axis in NAMED_AXES if choices.get(axis)]


def base_name(option: str) -> str:
    """An option without the folders that it lies in: factorial/easy_moving_chained -> easy_moving_chained."""
    return option.rpartition("/")[2]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that readers see whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
