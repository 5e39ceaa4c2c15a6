"""The ranks of a run without torchrun: forked from a process that has imported everything, so that a run takes seconds.

A rank does what it does under torchrun (sdpo/launch/rank.py), except that it does not watch a parent.
"""

import multiprocessing
import os
import socket
import sys
from contextlib import ExitStack
from functools import cache
from multiprocessing import forkserver

import pytest
from conftest import CHECKOUT

from sdpo import config as configuration
from sdpo.launch import rank
from sdpo.run.folder import Run

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def start(settings, folder, store, before=None):
    """Start the ranks of one run; `before()` is called in each of them first. Returns their processes."""
    Run(settings, folder, choices={}, arm="").prepare()
    world = {"WORLD_SIZE": str(settings.launch.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    world["SDPO_STORE"] = str(store)
    processes = []
    for number in range(settings.launch.ranks):
        its_own = world | {"RANK": str(number), "LOCAL_RANK": str(number)}
        processes.append(_context().Process(target=_rank, args=(folder, its_own, before), daemon=True))
        processes[-1].start()
    return processes


def finish(folder, processes):
    """Wait until the ranks of a run end; AssertionError with what they wrote if one failed."""
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    assert not any(codes), "\n".join(path.read_text() for path in sorted(folder.glob("rank-*.txt")))


def _rank(folder, world, before):
    os.environ |= world
    with (folder / f"rank-{world['RANK']}.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if before:
        before()
    rank.exit_at_signals(even_if_ignored=True)
    rank.execute(configuration.load(folder / "config.yaml"), folder)


@cache
def _context():
    """The context of processes that are forked from one with torch and DeepSpeed in memory and with a single thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sdpo.stepwise", "deepspeed", __name__])
    with pytest.MonkeyPatch.context() as patch:
        for name in THREADS:
            patch.setenv(name, "1")
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("JE_ARROW_MALLOC_CONF", "background_thread:false")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(CHECKOUT), *sys.path]))
        forkserver.ensure_running()
    return context


_given = set()


def _free_port():
    """A port that is free, and that no earlier call returned: runs that start together need several."""
    with ExitStack() as opened:
        while True:
            server = opened.enter_context(socket.create_server(("127.0.0.1", 0)))
            port = str(server.getsockname()[1])
            if port not in _given:
                _given.add(port)
                return port
