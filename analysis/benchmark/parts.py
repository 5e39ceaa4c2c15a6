"""The parts of the benchmark, each in a process of its own: one that fails or is cut off loses only itself.

python -m analysis.benchmark.parts PART WORK.json RESULT.json
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from analysis.benchmark.work import Work
from sdpo.run.folder import write_json

SIDES = ("trl_default", "trl_tuned", "engine", "trl_lora", "engine_lora")
ON_GPU = ("1b", "3b", "7b", "attention", "head", "small")
PARTS = (*SIDES, "agreement", "steps", *ON_GPU)
WITH_TRL = ("trl_default", "trl_tuned", "trl_lora", "agreement")
QUIET = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}


class Outcome(NamedTuple):
    """What a part measured, also if it did not end well; `failure` says why it did not, in one line."""

    result: dict
    failure: str | None


def measure(part: str, work: Work, limit: float) -> Outcome:
    """Run a part in its own process, with one thread and for at most `limit` seconds."""
    folder = Path(work.folder)
    work_file, result_file, log_file = (folder / f"{part}.{name}" for name in ("work.json", "json", "log"))
    work_file.write_text(json.dumps(work._asdict()))
    command = [sys.executable, "-m", "analysis.benchmark.parts", part, str(work_file), str(result_file)]
    env = os.environ | QUIET | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if work.device == "cuda":  # one GPU, because TRL refuses to train on several in one process
        env["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(limit)
            failure = _why(code, log_file) if code else None
        except subprocess.TimeoutExpired:
            failure = f"cut off after {limit:g} s"
        finally:
            _end(process)
    return Outcome(json.loads(result_file.read_text()) if result_file.exists() else {}, failure)


def _why(code: int, log_file: Path) -> str:
    """The last line of what a process printed, which is its error."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = log_file.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"ended with code {code}"


def _end(process: subprocess.Popen) -> None:
    """End the process with all its children, such as those that compile."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def main(part: str, work_file: str, result_file: str) -> None:
    """Measure one part. Its results are written as they come, so that they outlive a process that is cut off."""
    torch.set_num_threads(1)
    results: dict = {}

    def report(more: dict) -> None:
        results.update(more)
        write_json(Path(result_file), results)

    began = time.monotonic()
    work = Work(**json.loads(Path(work_file).read_text()))
    _function(part)(work, report)
    report({"seconds": time.monotonic() - began})


def _function(part: str) -> Callable[[Work, Callable[[dict], None]], None]:
    """What measures a part. Only what this process needs is imported: a side without TRL runs without it."""
    if part.startswith("trl_"):
        from analysis.benchmark import trl

        return trl.with_defaults if part == "trl_default" else trl.tuned
    if part == "agreement":
        from analysis.benchmark import agreement

        return agreement.first_update
    from analysis.benchmark import cuda, ours, small

    return {
        "engine": ours.in_memory,
        "engine_lora": ours.in_memory,
        "steps": ours.many_steps,
        "attention": cuda.attention,
        "head": cuda.head,
        "small": small.side_by_side,
    }.get(part, cuda.sweep)


if __name__ == "__main__":
    main(*sys.argv[1:])
