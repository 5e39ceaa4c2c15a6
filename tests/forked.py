"""Processes forked from one that has imported everything and has a single thread, so that a run takes seconds."""

import multiprocessing
import os
import pickle
import sys
import warnings
from functools import cache, partial
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from conftest import CHECKOUT

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def start(target, environment, output, **options):
    """Start a process that calls `target` with more environment variables, and writes what it says into a file."""
    process = _context().Process(target=_run, args=(target, environment, output), **options)
    process.start()
    return process


def on_ranks(num_ranks, target, *arguments):
    """What `target(*arguments)` returns on every rank of a process group; AssertionError with its words if it fails."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        execute = partial(_as_a_rank, folder, target, arguments)
        worlds = [{"WORLD_SIZE": str(num_ranks), "RANK": str(rank), "LOCAL_RANK": "0"} for rank in range(num_ranks)]
        processes = [start(execute, world, folder / f"{world['RANK']}.txt", daemon=True) for world in worlds]
        for process in processes:
            process.join(300)
        said = [(folder / f"{rank}.txt").read_text() for rank in range(num_ranks)]
        assert [process.exitcode for process in processes] == [0] * num_ranks, "\n".join(said)
        return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(num_ranks)]


def _as_a_rank(folder, target, arguments):
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_ranks)
    warnings.simplefilter("ignore")  # those of DeepSpeed
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(target(*arguments)))


def _run(target, environment, output):
    os.environ |= environment
    with output.open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    target()


@cache
def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sdpo.stepwise", "sdpo.plan.report", "analysis.report", "deepspeed", __name__])
    with pytest.MonkeyPatch.context() as patch:
        for name in THREADS:
            patch.setenv(name, "1")
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("JE_ARROW_MALLOC_CONF", "background_thread:false")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(CHECKOUT), *sys.path]))
        forkserver.ensure_running()
    return context
