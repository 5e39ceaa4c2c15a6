"""Ranks: started by the real torchrun, killed for real; no process outlives the command that started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture
def command(toy, tmp_path, monkeypatch):
    """command(*overrides): train.py on the toy, with a store and an output folder of its own."""
    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    base = ["model=local", f"model.path={toy / 'model'}", "data=local", f"data.train=[{toy / 'a.jsonl'}]"]
    base += ["data.template=plain", "data.held_out_share=0.2", "launch.device=cpu", "hydra.run.dir=run"]
    return lambda *overrides: [sys.executable, str(CHECKOUT / "train.py"), *base, *overrides]


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


SLOW = [pytest.param(victim, marks=pytest.mark.slow) for victim in ("agent", "rank")]


@pytest.mark.parametrize("victim", ["parent", *SLOW])
def test_killing_any_process_ends_them_all(command, tmp_path, victim):
    endless = command("launch.ranks=2", "optim.epochs=100000")
    parent = subprocess.Popen(endless, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    (agent,) = children(parent.pid)
    ranks = children(agent)
    assert len(ranks) == 2
    os.kill({"parent": parent.pid, "agent": agent, "rank": ranks[1]}[victim], signal.SIGKILL)
    wait_until(lambda: not any(map(alive, [parent.pid, agent, *ranks])), 30)
    error = parent.communicate()[1]
    if victim == "parent":
        return
    assert parent.returncode == 1 and error.count("\n") == 1
    sentence = "a rank was killed by SIGKILL" if victim == "rank" else "torchrun died"
    assert error.startswith(f"error: {sentence}; ") and "run/log.txt has the details" in error
    assert (tmp_path / "run" / "error.txt").read_text().startswith(sentence)
    assert not (tmp_path / "run" / "done").exists()


@pytest.mark.slow
def test_the_error_of_a_rank_is_the_error_of_the_run(command, tmp_path):
    ended = subprocess.run(
        command("launch.ranks=2", "split=random", "split.num_chunks=99"), capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert ended.stderr.removeprefix("error: ").strip() == (tmp_path / "run" / "error.txt").read_text().splitlines()[0]
    assert "99" in ended.stderr
