"""metrics.jsonl while a run trains: lines come during a step, each update has one, and nothing else writes any.

The toy has three sources of 20 to 24 training pairs; at 8 pairs an update, each is a step of 3 updates.
"""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import CHECKOUT, compose, read_lines

from sdpo import distributed, stepwise
from sdpo.errors import UserError
from sdpo.model import engine
from sdpo.run import folder as run_folder

QUICK = ["split=by_source", "evaluate=[]"]
ALL = [(t, update) for t in (1, 2, 3) for update in (1, 2, 3)]


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.fixture
def observed(monkeypatch, tmp_path):
    """Before every update, the lines that the run's metrics.jsonl has by then; `kill_at` ends the process there."""

    class Observed(list):
        kill_at = None

    seen, update = Observed(), engine.Plain.update

    def observe(self, lr):
        if len(seen) == seen.kill_at:
            raise Killed
        seen.append(lines(tmp_path / "run"))
        return update(self, lr)

    monkeypatch.setattr(engine.Plain, "update", observe)
    return seen


def lines(folder):
    """(step, update) of each line that was written for an update."""
    return [(entry["t"], entry["update"]) for entry in read_lines(folder, "train")]


def test_seconds_include_the_wait_for_the_device(run, monkeypatch):
    """A GPU does its work while the host waits for the statistics of a group of updates: here for 0.6 s."""
    total = distributed.total
    monkeypatch.setattr(distributed, "total", lambda tensor: (time.sleep(0.6), total(tensor))[1])
    for entry in read_lines(run(*QUICK, "record.every=2"), "train"):
        alone = entry["update"] == 3  # in its group
        assert entry["seconds"] >= (0.6 if alone else 0.3)
        assert entry["tokens_per_second"] == pytest.approx(entry["tokens"] / entry["seconds"])


@pytest.mark.parametrize(
    ("every", "numbers"),
    [
        (1, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (2, [0, 0, 2, 3, 3, 5, 6, 6, 8]),  # the third update of a step is alone in the step's last group
        (99, [0, 0, 0, 3, 3, 3, 6, 6, 6]),  # a step's end writes what is left
    ],
)
def test_lines_are_written_during_a_step_in_groups_of_record_every(run, observed, every, numbers):
    folder = run(*QUICK, f"record.every={every}")
    assert observed == [ALL[:number] for number in numbers]
    assert lines(folder) == ALL


def test_after_a_kill_every_update_has_one_line(run, observed):
    """Killed at the third update of step 2: the second run finds step 1, resumes step 2, and trains step 3."""
    observed.kill_at = 5
    with pytest.raises(Killed):
        run(*QUICK, "record.every=2", "launch.checkpoint_minutes=0")
    observed.kill_at = None
    observed.clear()
    folder = run(*QUICK, "record.every=2", "launch.checkpoint_minutes=0")
    assert observed == [ALL[:number] for number in (5, 6, 6, 8)]  # 3 lines of step 1, 2 of step 2's checkpoint
    assert lines(folder) == ALL
    assert [step["reused"] for step in read_lines(folder, "step")] == [True, False, False]


def test_a_finished_step_is_logged_once_when_it_is_found(run, observed):
    first = read_lines(run(*QUICK), "train")
    assert not any("utilisation" in line for line in first)  # this processor's peak is not known
    observed.clear()
    assert read_lines(run(*QUICK), "train") == first and not observed


def test_updates_before_one_that_diverges_are_logged(run, observed, tmp_path):
    """All three updates of the step are one group: the error comes with the second one's numbers."""
    with pytest.raises(UserError, match="update 2: .* is not finite"):
        run(*QUICK, "record.every=99", "optim.lr=1e30", "optim.warmup=0", "optim.clip=1e30")
    assert len(observed) == 3 and lines(tmp_path / "run") == ALL[:1]


def test_models_that_only_score_pairs_log_nothing(run, observed):
    """Two models train on 33 and 32 of the 65 pairs, each as a step 1; then step 1 of the run has the easiest 33."""
    folder = run("split=all_at_once", "split.keep=0.5", "score=validation_loss", "score.repeats=1", "evaluate=[]")
    assert len(observed) == 5 + 4 + 5 and lines(folder) == ALL[:3] + [(1, 4), (1, 5)]


def test_the_training_of_the_laboratory_s_model_logs_nothing(tmp_path, observed, monkeypatch):
    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "store"))
    settings = compose("experiment=smoke", "split=all_at_once", "evaluate=[]", "optim.pairs_per_update=999")
    folder = tmp_path / "run"
    run_folder.Run(settings, folder, choices={}, arm="run").prepare()
    stepwise.run(settings, folder)
    assert len(observed) > 1 and lines(folder) == [(1, 1)]


@pytest.mark.slow
def test_of_two_ranks_one_writes(toy, tmp_path):
    command = [sys.executable, str(CHECKOUT / "train.py"), "launch.ranks=2", "evaluate=[]", "split=all_at_once"]
    command += ["model=local", f"model.path={toy / 'model'}", "data=local", f"data.train=[{toy / 'a.jsonl'}]"]
    command += ["data.template=plain", "optim.pairs_per_update=8", f"hydra.run.dir={tmp_path / 'run'}"]
    subprocess.run(command, env=os.environ | {"SDPO_STORE": str(tmp_path / "store")}, check=True, capture_output=True)
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["kind"], entry.get("update")) for entry in written] == [
        ("eval", None), ("train", 1), ("train", 2), ("train", 3), ("step", None), ("eval", None),
    ]  # fmt: skip
