"""The run folder from outside: its name, what it was asked for, whether it is finished, how it failed."""

import hashlib
import json
import traceback
from pathlib import Path

from sdpo import config as configuration
from sdpo.config import Config
from sdpo.store import NUMERICS_VERSION


def name(choices: dict[str, str], seed: int, settings: dict) -> str:
    """Choices, seed, and a short hash of all settings: by_source-previous-dpo-s0-1f2e3d."""
    axes = [
        choices[axis] for axis in ("arm", "data", "model", "split", "reference", "loss") if choices.get(axis)
    ]
    whole = json.dumps({**settings, "plan": False}, sort_keys=True)
    return "-".join([*axes, f"s{seed}", hashlib.sha256(whole.encode()).hexdigest()[:6]])


def prepare(config: Config, folder: Path, origin: dict) -> None:
    """A folder ready to run in: the resolved configuration, and where it comes from as the manifest's beginning."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in ("done", "error.txt"):
        (folder / leftover).unlink(missing_ok=True)
    (folder / "config.yaml").write_text(configuration.to_yaml(config))
    (folder / "manifest.json").write_text(json.dumps({"run": folder.name, **origin}, indent=1))


def finish(config: Config, folder: Path) -> None:
    (folder / "done").write_text(_stamp(config))


def is_finished(config: Config, folder: Path) -> bool:
    """Whether the folder holds this very run, of these settings, this code's numerics and these input files."""
    done = folder / "done"
    return done.is_file() and done.read_text() == _stamp(config)


def fail(folder: Path, error: BaseException) -> None:
    """Keep an error in error.txt, its sentence first; of several ranks the first to fail has the cause."""
    sentence = (
        one_line(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {one_line(error)}"
    )
    try:
        with (folder / "error.txt").open("x") as file:
            file.write(f"{sentence}\n\n{''.join(traceback.format_exception(error))}")
    except FileExistsError:
        pass


def failure(folder: Path) -> str | None:
    """The sentence of the error that ended the run, where one did."""
    path = folder / "error.txt"
    return path.read_text().splitlines()[0] if path.is_file() else None


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _stamp(config: Config) -> str:
    """A hash of everything that a finished run stands for; input files enter with their size and time."""
    settings = configuration.to_yaml(config)
    paths = [Path(p) for p in (*config.data.train, *config.data.held_out, config.model.path) if p]
    files = [
        file for path in paths for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file()
    ]
    states = sorted((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return hashlib.sha256(repr((settings, NUMERICS_VERSION, states)).encode()).hexdigest()
