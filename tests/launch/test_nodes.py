"""Two nodes, as two groups of processes that meet over the loopback: the bytes of one node, and how they end."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import ranks
from conftest import CHECKOUT, compose
from processes import children, wait_until

from sdpo import config
from sdpo.run.folder import Run, failure


@pytest.fixture
def start(tmp_path):
    """start(folder, *arguments) starts the command of one node, in a session and store of its own run."""
    started = []

    def go(folder, *arguments):
        command = [sys.executable, "-m", "sdpo.launch", str(folder / "config.yaml"), *arguments]
        environment = os.environ | {"SDPO_STORE": str(folder) + "-store"}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=CHECKOUT, env=environment, start_new_session=True, **pipes))
        return started[-1]

    yield go
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture
def prepared(tmp_path):
    def prepare(name, *overrides):
        """The folder of a run of four ranks on the laboratory."""
        settings = compose("experiment=smoke", "split=all_at_once", "launch.ranks=4", *overrides)
        Run(settings, tmp_path / name, choices={}, arm="").prepare()
        return tmp_path / name

    return prepare


def meeting():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


def final_bytes(folder):
    return (folder / "steps" / "1" / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["off", "zero3"])
def test_two_nodes_train_to_the_bytes_of_one(prepared, start, stage):
    whole, shared = prepared("whole", f"deepspeed={stage}"), prepared("shared", f"deepspeed={stage}")
    ranks.finish(whole, ranks.start(config.load(whole / "config.yaml"), whole, f"{whole}-store"))
    at = meeting()
    nodes = [start(shared, "--node", str(node), "--of", "2", "--at", at) for node in range(2)]
    assert [(node.communicate()[1], node.returncode) for node in nodes] == [("", 0)] * 2
    assert final_bytes(shared) == final_bytes(whole)
    assert (shared / "log.txt").exists() and (shared / "log-1.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_node_ends_the_other_within_ten_seconds(prepared, start, killed):
    folder, at = prepared("run", "optim.epochs=3000", "evaluate=[]"), meeting()
    nodes = [start(folder, "--node", str(node), "--of", "2", "--at", at) for node in range(2)]
    wait_until(lambda: (folder / "metrics.jsonl").exists() and '"train"' in (folder / "metrics.jsonl").read_text())
    (torchrun,) = children(nodes[killed].pid)
    os.killpg(torchrun, signal.SIGKILL)  # it and its ranks
    os.killpg(nodes[killed].pid, signal.SIGKILL)
    began = time.monotonic()
    error = nodes[1 - killed].communicate(timeout=60)[1]
    assert time.monotonic() - began < 10 and nodes[1 - killed].returncode == 1
    assert error.startswith("error: a rank or its node ended without an error of its own") and error.count("\n") == 1
    assert error == f"error: {failure(folder)}\n"
