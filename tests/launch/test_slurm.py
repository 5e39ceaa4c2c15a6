"""A real SLURM of two nodes: a sweep of two runs, and a run on both nodes that is requeued as at its time limit.

The nodes must share pytest's folder (--basetemp).
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import CHECKOUT
from processes import wait_until

SMALL = ["experiment=smoke", "split=all_at_once", "evaluate=[]"]
SLURM = ["-m", "hydra.launcher.backend=slurm", "hydra.launcher.slurm.timeout_min=30"]


@pytest.fixture(autouse=True, scope="module")
def _slurm():
    if not shutil.which("sinfo") or subprocess.run(["sinfo", "--noheader"], capture_output=True).returncode:
        pytest.skip("no SLURM answers to sinfo")


def start(folder, *overrides):
    command = [sys.executable, str(CHECKOUT / "train.py"), *overrides, *SMALL]
    environment = os.environ | {"SDPO_STORE": str(folder / "store")}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def final_bytes(run):
    return (run / "steps" / "1" / "model.safetensors").read_bytes()


def updates(sweep):
    lines = [json.loads(line) for file in sweep.glob("*/metrics.jsonl") for line in file.read_text().splitlines()]
    return [line["update"] for line in lines if line["kind"] == "train"]


@pytest.mark.slow
def test_a_sweep_is_one_array_of_jobs(tmp_path):
    launcher = start(tmp_path, *SLURM, "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    out, err = launcher.communicate()
    assert launcher.returncode == 0 and "2 of 2 runs finished" in out, err
    ids = sorted(json.loads((tmp_path / "sweep" / "jobs.json").read_text()).values())
    array = ids[0].partition("_")[0]
    assert ids == [f"{array}_0", f"{array}_1"]


@pytest.mark.slow
def test_a_run_on_two_nodes_that_is_requeued_ends_with_the_bytes_of_one_node(tmp_path):
    ranks, sweep = ["launch.ranks=2", "optim.epochs=40"], tmp_path / "sweep"
    whole = start(tmp_path / "whole", *ranks, f"hydra.run.dir={tmp_path / 'run'}")
    assert whole.communicate() and whole.returncode == 0
    launcher = start(tmp_path, *SLURM, *ranks, "launch.nodes=2", f"hydra.sweep.dir={sweep}")
    wait_until(lambda: launcher.poll() is not None or len(updates(sweep)) >= 10)
    (job,) = json.loads((sweep / "jobs.json").read_text()).values()
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    err = launcher.communicate()[1]
    assert launcher.returncode == 0, err
    assert "Requeued job" in (sweep / "slurm" / f"{job}_0_log.out").read_text()
    assert updates(sweep) == list(range(1, 121))  # none is done twice
    (run,) = (file.parent for file in sweep.glob("*/summary.json"))
    assert final_bytes(run) == final_bytes(tmp_path / "run")
