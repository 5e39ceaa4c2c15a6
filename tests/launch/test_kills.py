"""A run of two ranks is killed in a step and started again: no orphans, and the bytes of an uninterrupted run."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import CHECKOUT
from processes import alive, children, wait_until

SENTENCES = {"agent": "torchrun died", "rank": "a rank was killed by SIGKILL"}  # a killed parent prints nothing


@pytest.fixture(scope="module")
def command(toy):
    """The command of one step of 60 updates whose reference moves every 4, with a checkpoint after every update."""
    return [
        *(sys.executable, str(CHECKOUT / "train.py"), "launch.ranks=2", "launch.checkpoint_minutes=0"),
        *("data=local", f"data.train=[{toy / 'a.jsonl'},{toy / 'b.jsonl'}]", "data.template=plain"),
        *("model=local", f"model.path={toy / 'model'}", "evaluate=[]", "split=all_at_once"),
        *("optim.lr=3e-3", "optim.pairs_per_update=8", "optim.epochs=10"),
        *("reference=mixed", "reference.alpha=0.6", "reference.updates=4"),
    ]


def start(command, stage, folder):
    environment = os.environ | {"SDPO_STORE": str(folder / "store")}
    overrides = [f"deepspeed={stage}", f"hydra.run.dir={folder / 'run'}"]
    heeding = ["env", "--default-signal=HUP"]  # also under nohup
    return subprocess.Popen([*heeding, *command, *overrides], env=environment, stderr=subprocess.PIPE, text=True)


def updates_kept(folder):
    """The updates in the newest checkpoint of the step."""
    return max((int(path.name) for path in folder.glob("store/partial/*/[0-9]*")), default=0)


def final_bytes(folder):
    return (folder / "run" / "steps" / "1" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory):
    """uninterrupted(stage) is the bytes of a run that is not killed."""
    known = {}

    def train(stage):
        if stage not in known:
            folder = tmp_path_factory.mktemp("uninterrupted")
            alone = start(command, stage, folder)
            assert (alone.communicate()[1], alone.returncode) == ("", 0)
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
def test_a_killed_run_started_again_ends_in_the_same_bytes(command, uninterrupted, tmp_path, stage, victim, cache):
    parent = start(command, stage, tmp_path)
    wait_until(lambda: updates_kept(tmp_path) > 8)
    (agent,) = children(parent.pid)
    ranks = children(agent)
    os.kill({"parent": parent.pid, "agent": agent, "rank": ranks[1]}[victim], signal.SIGKILL)
    wait_until(lambda: not any(map(alive, [parent.pid, agent, *ranks])), 60)
    error = parent.communicate()[1]
    if victim != "parent":
        assert parent.returncode == 1 and error.count("\n") == 1
        assert error.startswith(f"error: {SENTENCES[victim]}; ") and "run/log.txt has the details" in error
    assert updates_kept(tmp_path) < 60 and not (tmp_path / "run" / "done").exists()
    if cache == "deleted":
        shutil.rmtree(tmp_path / "store" / "logprobs")
    again = start(command, stage, tmp_path)
    assert (again.communicate()[1], again.returncode) == ("", 0)
    assert final_bytes(tmp_path) == uninterrupted(stage)
