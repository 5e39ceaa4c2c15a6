"""A sweep: check it, write down what it is, execute the runs that are not finished, print the table.

Hydra hands the runs over in hydra_plugins/arms.py.
"""

import json
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sdpo import console, distributed, validate
from sdpo.config import Settings
from sdpo.errors import UserError
from sdpo.launch import forks
from sdpo.launch.summary import summary_table
from sdpo.run import folder as run_folder
from sdpo.run.folder import Run

MOST_CONTRASTS = 8  # with more of them Holm's correction leaves no power


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep, and how to execute them."""

    folder: Path
    runs: list[Run]
    overrides: list[str]
    contrasts: dict[str, list[str]]  # what is tested -> the two arms that it compares; declared before any run
    n: int | str  # runs at a time; auto: as many as cores, or the memory of the GPUs, allow
    backend: str  # local | slurm
    slurm: Settings  # submitit's parameters


def run(sweep: Sweep) -> bool:
    """Execute the runs that are not finished and print the table. Returns False if the sweep was only planned."""
    _check(sweep)
    todo = [one for one in sweep.runs if not one.finished]
    for one in {one.arm: one for one in todo}.values():  # runs of one arm differ in their seed only
        validate.check(one.config)
    if any(one.config.plan for one in sweep.runs):
        from sdpo.plan import report

        report.show(sweep.runs)
        if sweep.backend == "slurm":
            from sdpo.launch import cluster

            print(cluster.announce(todo, sweep.folder, sweep.slurm))
        return False
    _prepare(sweep, todo)
    try:
        finished = len(sweep.runs) - len(todo)
        with console.Progress(len(sweep.runs), sweep.folder.name, "runs", done=finished) as bar:
            bar.show("each run tells more in its log.txt")
            if todo and sweep.backend == "slurm":
                from sdpo.launch import cluster  # here, because most sweeps do not need submitit

                cluster.execute(todo, sweep.folder, sweep.slurm, bar)
            elif todo:
                with distributed.stops_deferred():
                    forks.execute(todo, sweep.n, bar)
    except (KeyboardInterrupt, SystemExit):
        print(summary_table(sweep.runs, {one.folder for one in todo}))
        raise
    print(summary_table(sweep.runs, {one.folder for one in todo}))
    return True


def refuse_failures(sweep: Sweep) -> None:
    """Raise UserError if a run of the sweep failed."""
    if failed := [one for one in sweep.runs if one.error]:
        raise UserError(f"{len(failed)} of {len(sweep.runs)} runs failed; the same command retries only these")


def leave_nothing(folder: Path) -> None:
    """Remove what Hydra wrote for a sweep that was refused or only planned."""
    if not (folder / "sweep.json").exists():
        (folder / "multirun.yaml").unlink(missing_ok=True)
        with suppress(OSError):  # the folder does not exist, or holds other files
            folder.rmdir()


def _prepare(sweep: Sweep, todo: list[Run]) -> None:
    """Prepare the run folders and write sweep.json. Raises UserError if contrasts change after some runs finished."""
    written = sweep.folder / "sweep.json"
    if written.is_file() and any(one.finished for one in sweep.runs):
        if json.loads(written.read_text())["contrasts"] != sweep.contrasts:
            raise UserError(
                f"{written} declares other contrasts, and some of its runs are finished: declare the new contrasts in "
                "a sweep with another folder, hydra.sweep.dir=...; it will reuse the steps from the store"
            )
    for one in todo:
        one.prepare()
    names = {"name": sweep.folder.name, "command": sys.argv, "overrides": sweep.overrides}
    folders = [one.folder.name for one in sweep.runs]
    run_folder.write_json(written, {**names, "runs": folders, "contrasts": sweep.contrasts})


def _check(sweep: Sweep) -> None:
    """Raise UserError for invalid settings of the launcher."""
    if sweep.backend not in ("local", "slurm"):
        raise UserError(f"hydra.launcher.backend is {sweep.backend!r}; it can be local, slurm")
    if not (sweep.n == "auto" or isinstance(sweep.n, int) and sweep.n > 0):
        raise UserError(f"hydra.launcher.n is {sweep.n!r}; it can be auto or a number above 0")
    if len(sweep.contrasts) > MOST_CONTRASTS:
        raise UserError(f"{len(sweep.contrasts)} contrasts are declared; at most {MOST_CONTRASTS} are allowed")
    arms = list(dict.fromkeys(one.arm for one in sweep.runs))
    for name, pair in sweep.contrasts.items():
        if len(pair) != 2:
            raise UserError(f"the contrast {name!r} has {len(pair)} arms; it compares two, [a, b]")
        if unknown := [arm for arm in pair if arm not in arms]:
            raise UserError(f"a contrast names the arm {unknown[0]!r}; this sweep has {', '.join(map(repr, arms))}")
