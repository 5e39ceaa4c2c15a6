"""Processes forked from one that has imported everything and has a single thread, so that a run takes seconds."""

import multiprocessing
import os
import sys
from functools import cache
from multiprocessing import forkserver

import pytest
from conftest import CHECKOUT

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def start(target, environment, output, **options):
    """Start a process that calls `target` with more environment variables, and writes what it says into a file."""
    process = _context().Process(target=_run, args=(target, environment, output), **options)
    process.start()
    return process


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
