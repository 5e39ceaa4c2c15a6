"""A sweep: all its runs, n at a time, each in a process of its own; one bar, one table, every failure named.

Hydra hands the runs over in hydra_plugins/arms.py. On one machine they are forked from this process, which has
imported torch but computed nothing and started no thread. On a cluster each is a job, which reads the
configuration as it was when the job was submitted.
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, islice
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from tqdm import tqdm

from sdpo import console, distributed, validate
from sdpo.config import Settings
from sdpo.errors import UserError
from sdpo.launch import local as launch
from sdpo.launch import summary
from sdpo.run import folder as run_folder
from sdpo.run.folder import Run

MOST_CONTRASTS = 8  # more declared ones leave Holm's correction no power


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep, and how they are to be done."""

    folder: Path
    runs: list[Run]
    overrides: list[str]
    contrasts: dict[str, list[str]]  # what is tested: two arms; declared before anything runs
    n: int | str  # runs at a time; auto: as many as the cores or GPUs allow
    backend: str  # local | slurm
    slurm: Settings  # submitit's parameters


def run(sweep: Sweep) -> bool:
    """Do what is missing of a sweep and print its table; returns False if the sweep was only planned."""
    _check(sweep)
    distributed.set_threads(1)  # before torch starts; every run then sets its own number
    todo = [one for one in sweep.runs if not one.finished]
    for one in {one.arm: one for one in todo}.values():  # the runs of an arm differ in their seed alone
        validate.check(one.config)
    if any(one.config.plan for one in sweep.runs):
        from sdpo.plan import report

        report.show(sweep.runs)
        _leave_nothing(sweep.folder)
        return False
    _prepare(sweep, todo)
    try:
        finished = len(sweep.runs) - len(todo)
        with console.progress(len(sweep.runs), sweep.folder.name, "runs", done=finished) as bar:
            if todo:
                (_cluster if sweep.backend == "slurm" else _local)(sweep, todo, bar)
    except KeyboardInterrupt:
        print(summary.of(sweep.runs, {one.folder for one in todo}))
        raise
    print(summary.of(sweep.runs, {one.folder for one in todo}))
    return True


def refuse_failures(sweep: Sweep) -> None:
    """Raise UserError if a run of the sweep failed."""
    if failed := [one for one in sweep.runs if one.error]:
        raise UserError(f"{len(failed)} of {len(sweep.runs)} runs failed; the same command retries them alone")


def _leave_nothing(folder: Path) -> None:
    """Remove what Hydra wrote of a sweep that was only planned."""
    if not (folder / "sweep.json").exists():
        (folder / "multirun.yaml").unlink(missing_ok=True)
        with suppress(OSError):  # there is none, or somebody keeps something in it
            folder.rmdir()


def _prepare(sweep: Sweep, todo: list[Run]) -> None:
    """Make the folders ready, and write down what the sweep is. UserError for contrasts that follow results."""
    written = sweep.folder / "sweep.json"
    if written.is_file() and any(one.finished for one in sweep.runs):
        if json.loads(written.read_text())["contrasts"] != sweep.contrasts:
            raise UserError(
                f"{written} declares other contrasts, and some of its runs are finished: declare these in a sweep of "
                "another folder, hydra.sweep.dir=..., which finds their steps in the store"
            )
    for one in todo:
        one.prepare()
    names = {"name": sweep.folder.name, "command": sys.argv, "overrides": sweep.overrides}
    folders = [one.folder.name for one in sweep.runs]
    run_folder.write_json(written, {**names, "runs": folders, "contrasts": sweep.contrasts})


def _check(sweep: Sweep) -> None:
    """UserError for what the launcher's settings cannot mean."""
    if sweep.backend not in ("local", "slurm"):
        raise UserError(f"hydra.launcher.backend is {sweep.backend!r}; it can be local, slurm")
    if not (sweep.n == "auto" or isinstance(sweep.n, int) and sweep.n > 0):
        raise UserError(f"hydra.launcher.n is {sweep.n!r}; it can be auto or a number above 0")
    if len(sweep.contrasts) > MOST_CONTRASTS:
        raise UserError(f"{len(sweep.contrasts)} contrasts are declared; {MOST_CONTRASTS} is the most")
    arms = list(dict.fromkeys(one.arm for one in sweep.runs))
    for name, pair in sweep.contrasts.items():
        if len(pair) != 2:
            raise UserError(f"the contrast {name!r} has {len(pair)} arms; it compares two, [a, b]")
        if unknown := [arm for arm in pair if arm not in arms]:
            raise UserError(f"a contrast names the arm {unknown[0]!r}; this sweep has {', '.join(map(repr, arms))}")


def _ended(one: Run, bar: tqdm, error: str | None) -> None:
    """Count a run that came to its end; `error` is what is known of one that could not say it itself."""
    if error and not one.error:
        run_folder.fail(one.folder, UserError(error))
    if one.error:
        tqdm.write(f"failed: {one.folder.name}: {one.error}", file=sys.stderr)
    bar.update()


def _local(sweep: Sweep, todo: list[Run], bar: tqdm) -> None:
    """Fork a child per run, as many at a time as there are slots."""
    import sdpo.stepwise  # noqa: F401  imported once, here: the children find it in memory

    waiting, free = todo[::-1], _slots(sweep.n, todo)
    running: dict[int, tuple[BaseProcess, Run, str]] = {}
    alive = os.pipe()
    try:
        while waiting or running:
            while waiting and free:
                one, gpus = waiting.pop(), free.pop()
                child = multiprocessing.get_context("fork").Process(target=_child, args=(one, gpus, alive))
                child.start()
                running[child.sentinel] = child, one, gpus
            for sentinel in wait(running, timeout=1):
                child, one, gpus = running.pop(sentinel)
                child.join()
                free.append(gpus)
                _ended(one, bar, _exit_sentence(child.exitcode))
            bar.refresh()
    finally:
        for child, *_ in running.values():
            child.kill()
            child.join()
        for end in alive:
            os.close(end)


def _child(one: Run, gpus: str, alive: tuple[int, int]) -> None:
    """One run in its own process, which ends with its parent; what it prints goes to log.txt."""
    read, write = alive
    os.close(write)
    launch.exit_with_parent(read)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, who ends its children
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    with (one.folder / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    launch.run(one.config, one.folder)


def _exit_sentence(code: int) -> str | None:
    if code == 0:
        return None
    return f"killed by signal {-code}" if code < 0 else f"ended with code {code}; log.txt has the details"


def _slots(n: int | str, todo: list[Run]) -> list[str]:
    """For each run at a time, the GPUs that it sees (none: "")."""
    launches = [one.config.launch for one in todo]
    ranks = max(asked.ranks for asked in launches)
    gpus = [] if all(asked.device == "cpu" for asked in launches) else _gpus()
    if gpus and len(gpus) < ranks:
        raise UserError(f"launch.ranks={ranks}, but there are {len(gpus)} GPUs")
    if gpus:
        slots = [",".join(gpus[i : i + ranks]) for i in range(0, len(gpus) - ranks + 1, ranks)]
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        slots = [""] * max(1, cores // max(asked.ranks * asked.threads for asked in launches))
    return slots if n == "auto" else list(islice(cycle(slots), n))


def _gpus() -> list[str]:
    """The GPUs of this process, by the driver's tool: asking torch could start CUDA, which no fork survives."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.split()


def _cluster(sweep: Sweep, todo: list[Run], bar: tqdm) -> None:
    """Submit a job per run, and wait for all; Ctrl-C cancels them."""
    import submitit

    settings = dict(sweep.slurm)
    try:
        executor = submitit.AutoExecutor(sweep.folder / "slurm", cluster=settings.pop("cluster", "slurm"))
        executor.update_parameters(name=sweep.folder.name, **settings)
    except (NameError, RuntimeError, ValueError) as error:  # what submitit raises for unknown parameters
        raise UserError(f"hydra.launcher.slurm: {error}") from error
    with executor.batch():
        jobs = [executor.submit(submitit.helpers.CommandFunction(launch.job(one.folder))) for one in todo]
    try:
        for job in submitit.helpers.as_completed(jobs, poll_frequency=2):
            error = job.exception()
            last = str(error).strip().splitlines()[-1:] if error else []
            _ended(todo[jobs.index(job)], bar, f"the job failed: {' '.join(last)}" if error else None)
    except KeyboardInterrupt:
        for job in jobs:
            job.cancel()
        raise
