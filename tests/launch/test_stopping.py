"""A parent that is told to stop tells its ranks and runs, which save every update and end with code 85."""

import json
import os
import signal

import numpy as np
import pytest
from processes import alive, children, wait_until
from test_kills import final_bytes, finish, overrides, start, start_ranks, uninterrupted, updates_kept  # noqa: F401

from sdpo.distributed import STOPPED


def trained(folder):
    metrics = folder / "run" / "metrics.jsonl"
    return metrics.read_text().count('"train"') if metrics.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "stage"), [("SIGTERM", "zero3"), ("SIGUSR2", "zero2"), ("SIGHUP", "off")])
def test_a_parent_that_is_told_to_stop_loses_no_update(overrides, uninterrupted, tmp_path, stop, stage):  # noqa: F811
    rarely = [*overrides, "launch.checkpoint_minutes=1000"]
    parent = start(rarely, stage, tmp_path)
    wait_until(lambda: trained(tmp_path) > 3)
    parent.send_signal(getattr(signal, stop))
    error = parent.communicate()[1]
    assert (parent.returncode, error) == (STOPPED, "")
    assert 3 < updates_kept(tmp_path) == trained(tmp_path) < 60
    assert not (tmp_path / "run" / "error.txt").exists()
    finish(rarely, stage, tmp_path)
    assert final_bytes(tmp_path) == uninterrupted(stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["off", "zero2", "zero3"])
def test_one_rank_goes_on_from_where_two_were_stopped(overrides, tmp_path, stage):  # noqa: F811
    def losses(folder):
        lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if line["kind"] == "train"]

    alone = [*overrides, "launch.ranks=1", "launch.any_ranks=true"]
    two = start_ranks(overrides, stage, tmp_path)
    wait_until(lambda: trained(tmp_path) > 6)
    for process in two:
        process.terminate()
    for process in two:
        process.join()
    kept = updates_kept(tmp_path)
    finish(alone, stage, tmp_path)
    said = (tmp_path / "run" / "rank-0.txt").read_text()
    assert f"goes on from update {kept}, which 2 ranks saved, with 1" in said
    finish(alone, stage, tmp_path / "whole")
    np.testing.assert_allclose(losses(tmp_path), losses(tmp_path / "whole"), atol=1e-4)
    log = json.loads((tmp_path / "run" / "steps" / "1" / "train.json").read_text())
    assert log["ranks"] == [[0, 2], [kept, 1]]


@pytest.mark.slow
def test_a_rank_that_freezes_ends_the_run_with_the_sentence_of_the_other(overrides, tmp_path):  # noqa: F811
    parent = start([*overrides, "launch.timeout_minutes=0.2", "optim.epochs=3000"], "off", tmp_path)
    wait_until(lambda: trained(tmp_path) > 3)
    (agent,) = children(parent.pid)
    ranks = children(agent)
    os.kill(ranks[1], signal.SIGSTOP)
    assert parent.communicate()[1].startswith("error: a rank did not answer for 0.2 minutes")
    assert parent.returncode == 1 and not any(map(alive, ranks))  # torchrun killed it
