"""The runs of a sweep on this machine, several at a time, each in a process forked from this one.

Before it forks, this process has imported torch, computed nothing and started no thread, so that every child starts at
once and in a clean state.
"""

import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass
from math import inf
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path

from tqdm import tqdm

from sdpo.console import Progress
from sdpo.distributed import SHARES, SHARING, STOPPED, stop_requested
from sdpo.launch import local as launch
from sdpo.launch.order import Turn, by_first_missing_step
from sdpo.launch.placement import Need, Place, choose, places_for
from sdpo.launch.rank import end_undisturbed, follow_parent
from sdpo.launch.summary import note_end
from sdpo.run.folder import Run, write_json


@dataclass(eq=False)
class Started:
    """A run in its own process."""

    child: ForkProcess
    turn: Turn
    place: int
    most: int = 0  # runs at the place at a time so far, this one included


def execute(todo: list[Run], n: int | str, bar: Progress) -> None:
    """Execute the runs, `n` at a time (`auto`: as many as cores, or the memory of the GPUs, allow).

    A run that ran out of memory beside others is done again alone, after all others. An interrupt kills all children.
    If this process or one of them is told to stop, it exits with STOPPED.
    """
    import sdpo.stepwise  # noqa: F401  imported once, here: the children find it in memory

    places = places_for(todo, n)
    waiting = _in_turn(todo, places)[::-1]
    running: list[Started] = []
    alive, codes = os.pipe(), set[int | None]()
    try:
        while waiting or running:
            while waiting and (place := _free_place(places, running, waiting[-1].need)) is not None:
                running.append(_start(waiting.pop(), place, places[place], running, alive))
            for one in _ended(running):
                codes.add(one.child.exitcode)
                if _lacked_memory_beside_others(one):
                    waiting.insert(0, Turn(one.turn.run, Need(alone=True)))
                else:
                    note_end(one.turn.run, bar, _exit_sentence(one.child.exitcode))
            bar.wait()
            if stop_requested():
                waiting.clear()
                for one in running:
                    one.child.terminate()
        if STOPPED in codes or stop_requested():
            raise SystemExit(STOPPED)
    finally:
        for one in running:
            one.child.kill()
            one.child.join()
        for end in alive:
            os.close(end)


def _in_turn(todo: list[Run], places: list[Place]) -> list[Turn]:
    """The runs in the order in which they start. They are planned if some wait for others, or share a GPU by need."""
    if len(todo) <= len(places):
        return [Turn(run, Need(alone=True)) for run in todo]
    by_need = any(place.memory < inf for place in places)
    if sum(place.most for place in places) >= len(todo) and not by_need:
        return [Turn(run, Need()) for run in todo]
    turns = by_first_missing_step(todo)
    return turns if by_need else [turn._replace(need=Need()) for turn in turns]


def _free_place(places: list[Place], running: list[Started], need: Need) -> int | None:
    held = [[one.turn.need for one in running if one.place == i] for i in range(len(places))]
    return choose(places, held, need)


def _start(turn: Turn, index: int, place: Place, running: list[Started], alive: tuple[int, int]) -> Started:
    """Start a run. It and those at the same place are told how many share its GPUs, for the record of their speed."""
    child = multiprocessing.get_context("fork").Process(target=_child, args=(turn, place, alive))
    started = Started(child, turn, index)
    here = [one for one in [*running, started] if one.place == index]
    for one in here:
        one.most = max(one.most, len(here))
        if place.gpus:
            write_json(_sharing_file(one.turn.run), one.most)
    child.start()
    return started


def _ended(running: list[Started]) -> list[Started]:
    """The runs that have ended within the next second; they are no longer `running`."""
    sentinels = wait([one.child.sentinel for one in running], timeout=1)
    ended = [one for one in running if one.child.sentinel in sentinels]
    for one in ended:
        running.remove(one)
        one.child.join()
    return ended


def _lacked_memory_beside_others(one: Started) -> bool:
    """Whether a run failed for lack of memory while it was not alone. If so, the user is told that it is done again."""
    from sdpo.model.memory import tells_of_memory  # here, because it imports torch

    run, error = one.turn.run, one.turn.run.error
    if one.most < 2 or not one.child.exitcode or not error or not tells_of_memory(error):
        return False
    tqdm.write(f"{run.folder.name}: {error}; it ran beside {one.most - 1} others and is done again alone", sys.stderr)
    return True


def _child(turn: Turn, place: Place, alive: tuple[int, int]) -> None:
    """One run in its own process, which ends when its parent ends; what it prints goes to log.txt."""
    one, (read, write) = turn.run, alive
    os.close(write)
    follow_parent(read)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent kills its children
    if place.gpus:  # else the variable stays: there may be GPUs that nobody could count
        os.environ["CUDA_VISIBLE_DEVICES"] = place.gpus
        os.environ[SHARING] = str(_sharing_file(one))
        if place.most > 1 and not turn.need.alone:
            os.environ[SHARES] = "1"
    with (one.folder / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        launch.run(one.config, one.folder)
    finally:
        end_undisturbed()  # the parent repeats the signal until this process is gone


def _sharing_file(run: Run) -> Path:
    return run.folder / ".sharing"


def _exit_sentence(code: int | None) -> str | None:
    if not code or code == STOPPED:
        return None
    return f"killed by signal {-code}" if code < 0 else f"ended with code {code}; log.txt has the details"
