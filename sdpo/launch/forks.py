"""The runs of a sweep on this machine, several at a time, each in a process forked from this one.

Before it forks, this process has imported torch, computed nothing and started no thread, so that every child starts at
once and in a clean state.
"""

import multiprocessing
import os
import signal
from itertools import cycle, islice
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess

from tqdm import tqdm

from sdpo.distributed import STOPPED, stop_requested
from sdpo.errors import UserError
from sdpo.launch import local as launch
from sdpo.launch.order import by_first_missing_step
from sdpo.launch.rank import follow_parent
from sdpo.launch.summary import note_end
from sdpo.run.folder import Run
from sdpo.run.provenance import num_cores, query_gpus


def execute(todo: list[Run], n: int | str, bar: tqdm) -> None:
    """Execute the runs, `n` at a time (`auto`: as many as cores or GPUs allow).

    An interrupt kills all children. If this process or one of them is told to stop, it exits with STOPPED.
    """
    import sdpo.stepwise  # noqa: F401  imported once, here: the children find it in memory

    free = slots(todo, n)
    waiting = (by_first_missing_step(todo) if len(free) < len(todo) else todo)[::-1]
    running: dict[int, tuple[ForkProcess, Run, str]] = {}
    alive, codes = os.pipe(), set[int | None]()
    try:
        while waiting or running:
            while waiting and free:
                one, gpus = waiting.pop(), free.pop()
                child = multiprocessing.get_context("fork").Process(target=_child, args=(one, gpus, alive))
                child.start()
                running[child.sentinel] = child, one, gpus
            for sentinel in wait(list(running), timeout=1):
                assert isinstance(sentinel, int)
                child, one, gpus = running.pop(sentinel)
                child.join()
                codes.add(child.exitcode)
                free.append(gpus)
                note_end(one, bar, _exit_sentence(child.exitcode))
            bar.refresh()
            if stop_requested():
                waiting.clear()
                for child, *_ in running.values():
                    child.terminate()
        if STOPPED in codes or stop_requested():
            raise SystemExit(STOPPED)
    finally:
        for child, *_ in running.values():
            child.kill()
            child.join()
        for end in alive:
            os.close(end)


def _child(one: Run, gpus: str, alive: tuple[int, int]) -> None:
    """One run in its own process, which ends when its parent ends; what it prints goes to log.txt."""
    read, write = alive
    os.close(write)
    follow_parent(read)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent kills its children
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    with (one.folder / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    launch.run(one.config, one.folder)


def _exit_sentence(code: int | None) -> str | None:
    if not code or code == STOPPED:
        return None
    return f"killed by signal {-code}" if code < 0 else f"ended with code {code}; log.txt has the details"


def slots(todo: list[Run], n: int | str) -> list[str]:
    """One slot for each run at a time: the value of CUDA_VISIBLE_DEVICES for that run, "" without GPUs."""
    launches = [one.config.launch for one in todo]
    ranks = max(asked.ranks for asked in launches)
    gpus = [] if all(asked.device == "cpu" for asked in launches) else _gpus()
    if gpus and len(gpus) < ranks:
        raise UserError(f"launch.ranks={ranks}, but there are {len(gpus)} GPUs")
    if gpus:
        free = [",".join(gpus[i : i + ranks]) for i in range(0, len(gpus) - ranks + 1, ranks)]
    else:
        free = [""] * max(1, num_cores() // max(asked.ranks * asked.threads for asked in launches))
    return free if isinstance(n, str) else list(islice(cycle(free), n))


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return query_gpus("index") if visible is None else [gpu for gpu in visible.split(",") if gpu]
