"""A run of two ranks is killed in a step and started again: no orphans, and the bytes of an uninterrupted run.

What is killed was started by train.py. Other runs are forked ranks, which do the same without the time for imports.
"""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import ranks
from conftest import CHECKOUT, compose
from processes import alive, children, wait_until

SENTENCES = {"agent": "torchrun died", "rank": "a rank was killed by SIGKILL"}  # a killed parent prints nothing


@pytest.fixture(scope="module")
def overrides(toy):
    """One step of 60 updates whose reference moves every 4, with a checkpoint after every update."""
    return [
        *("launch.ranks=2", "launch.checkpoint_minutes=0", "launch.device=cpu"),
        *("data=local", f"data.train=[{toy / 'a.jsonl'},{toy / 'b.jsonl'}]", "data.template=plain"),
        *("model=local", f"model.path={toy / 'model'}", "evaluate=[]", "split=all_at_once"),
        *("optim.lr=3e-3", "optim.pairs_per_update=8", "optim.epochs=10"),
        *("reference=mixed", "reference.alpha=0.6", "reference.updates=4"),
    ]


def start(overrides, stage, folder):
    """Start train.py."""
    environment = os.environ | {"SDPO_STORE": str(folder / "store")}
    heeding = ["env", "--default-signal=HUP"]  # also under nohup
    command = [*heeding, sys.executable, str(CHECKOUT / "train.py"), *overrides, f"deepspeed={stage}"]
    command.append(f"hydra.run.dir={folder / 'run'}")
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def start_ranks(overrides, stage, folder):
    """Start the ranks alone."""
    return ranks.start(compose(*overrides, f"deepspeed={stage}"), folder / "run", folder / "store")


def finish(overrides, stage, folder):
    """Do the run, or what is left of it."""
    ranks.finish(folder / "run", start_ranks(overrides, stage, folder))


def updates_kept(folder):
    """The updates in the newest checkpoint of the step."""
    return max((int(path.name) for path in folder.glob("store/partial/*/[0-9]*")), default=0)


def final_bytes(folder):
    return (folder / "run" / "steps" / "1" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(overrides, tmp_path_factory):
    """uninterrupted(stage) is the bytes of a run that is not killed."""
    known = {}

    def train(stage):
        if stage not in known:
            folder = tmp_path_factory.mktemp("uninterrupted")
            finish(overrides, stage, folder)
            known[stage] = final_bytes(folder)
        return known[stage]

    return train


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "victim", "cache"),
    [
        ("off", "parent", "deleted"),
        ("zero1", "agent", "kept"),
        ("zero2", "rank", "kept"),
        ("zero3", "rank", "deleted"),
    ],
)
def test_a_killed_run_started_again_ends_in_the_same_bytes(overrides, uninterrupted, tmp_path, stage, victim, cache):
    parent = start(overrides, stage, tmp_path)
    wait_until(lambda: updates_kept(tmp_path) > 8)
    (agent,) = children(parent.pid)
    running = children(agent)
    os.kill({"parent": parent.pid, "agent": agent, "rank": running[1]}[victim], signal.SIGKILL)
    wait_until(lambda: not any(map(alive, [parent.pid, agent, *running])), 60)
    error = parent.communicate()[1]
    if victim != "parent":
        assert parent.returncode == 1 and error.count("\n") == 1
        assert error.startswith(f"error: {SENTENCES[victim]}; ") and "run/log.txt has the details" in error
    assert updates_kept(tmp_path) < 60 and not (tmp_path / "run" / "done").exists()
    if cache == "deleted":
        shutil.rmtree(tmp_path / "store" / "logprobs")
    finish(overrides, stage, tmp_path)
    assert final_bytes(tmp_path) == uninterrupted(stage)
