"""Small models side by side on one device, as the arms of a sweep run, beside one alone."""

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import torch

from analysis.benchmark.ours import configure, open_side, take_update
from analysis.benchmark.work import Work
from sdpo.model.packing import tokens_of

TOGETHER = 10
SECONDS = {"cpu": 1.0, "cuda": 8.0}  # for which the models train
LONGEST_START = 90.0  # seconds in which all processes must have started


def side_by_side(work: Work, report: Callable[[dict], None]) -> None:
    """Unique tokens per second in updates, of one model alone and of several at once, each in a process of its own."""
    rows: list[dict] = []
    for number in (1, TOGETHER):
        speeds = _run(work, number)
        rows.append({"models": number, "tokens_per_second_each": sum(speeds) / number, "together": sum(speeds)})
        report({"rows": rows})


def _run(work: Work, number: int) -> list[float]:
    context = multiprocessing.get_context("spawn")
    barrier, speeds = context.Barrier(number), context.SimpleQueue()
    processes = [context.Process(target=_train, args=(work, barrier, speeds)) for _ in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if failed := [process for process in processes if process.exitcode]:
        raise RuntimeError(f"{len(failed)} of {number} models failed, the first with code {failed[0].exitcode}")
    return [speeds.get() for _ in processes]


def _train(work: Work, barrier: Any, speeds: Any) -> None:
    torch.set_num_threads(1)
    rows, config = work.rows(), configure(work)
    engine = open_side(work, config)
    take_update(engine, rows, work.packs[0]).item()
    barrier.wait(LONGEST_START)
    began, updates = time.monotonic(), 0
    while (seconds := time.monotonic() - began) < SECONDS[work.device]:
        take_update(engine, rows, work.packs[0]).item()  # which waits for the device
        updates += 1
    speeds.put(updates * sum(map(tokens_of, rows)) / seconds)
