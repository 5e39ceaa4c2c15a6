"""Metrics, bars, lines and JSON files of a run, and the description of what it ran on."""

import io
import json
import math
import platform
import sys
import threading
from pathlib import Path

import pytest

from sdpo.console import progress, step_line
from sdpo.errors import UserError
from sdpo.metrics import Recorder, flatten
from sdpo.run.folder import write_json
from sdpo.run.provenance import environment

TRAIN = {"kind": "train", "t": 1, "update": 3, "loss": 0.1 + 0.2, "pairs": 32}
EVAL = {"kind": "eval", "t": 1, "eval": {"lab/gold": {"value": 0.5, "low": None, "high": 0.75, "n": 4}}}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_metrics_are_readable_at_once_and_begin_empty(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"of": "an earlier attempt"}\n')
    with Recorder(tmp_path) as recorder:
        recorder.log(TRAIN)
        recorder.log(EVAL)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [TRAIN, EVAL]
    assert not (tmp_path / "wandb").exists()


def test_a_number_that_is_not_finite_is_refused_by_name(tmp_path):
    with Recorder(tmp_path) as recorder:
        with pytest.raises(UserError, match="step 1, update 3: train/loss is not finite"):
            recorder.log(TRAIN | {"loss": math.nan})
        recorder.log(TRAIN | {"loss": None})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None


def test_flat_names():
    assert flatten(TRAIN) == {"train/loss": 0.1 + 0.2, "train/pairs": 32}
    assert flatten(EVAL) == {
        "eval/lab/gold": 0.5,
        "eval/lab/gold/low": None,
        "eval/lab/gold/high": 0.75,
        "eval/lab/gold/n": 4,
    }
    assert flatten({"kind": "step", "t": 1, "sources": {"orca": 7}}) == {"step/sources/orca": 7}


def test_a_bar_appears_after_two_seconds_on_a_terminal_and_starts_no_thread(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    now = 100.0
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    num_threads = threading.active_count()
    with progress(10, "step 1") as bar:
        bar.advance(4, tokens=400)
        assert screen.getvalue() == ""
        now += 4
        bar.advance(4, tokens=400)
        assert "step 1:  80%" in screen.getvalue() and "200 tokens/s" in screen.getvalue()
        assert "pairs/s" in screen.getvalue()
    assert threading.active_count() == num_threads


@pytest.mark.parametrize(("screen", "quiet"), [(Terminal(), True), (io.StringIO(), False)])
def test_no_bar_where_asked_or_without_a_terminal(monkeypatch, screen, quiet):
    monkeypatch.setattr(sys, "stderr", screen)
    with progress(2, "step 1", quiet=quiet) as bar:
        monkeypatch.setattr("tqdm.std.time", lambda: 1e12)
        bar.advance(2, tokens=5)
    assert screen.getvalue() == ""


def test_step_line():
    step = {
        "t": 2,
        "num_pairs": 519,
        "sources": {"orca": 500, "polite": 19},
        "first_loss": 0.69314718,
        "last_loss": 0.5,
        "gamma_ref_mean": -12.25,
        "tokens_per_second": 4321.5,
        "utilisation": None,
        "eval": {"preference/ranking_accuracy": {"value": 0.75, "low": None, "high": 0.8, "n": 9}},
    }
    assert step_line(step) == (
        "step 2  519 pairs of orca, polite  loss 0.6931 -> 0.5  gamma_ref -12.25  "
        "4322 tokens/s  preference/ranking_accuracy 0.75 [-, 0.8]"
    )
    assert step_line(step | {"gamma_ref_mean": None, "eval": {}}).endswith("gamma_ref -  4322 tokens/s")
    assert step_line(step | {"utilisation": 0.414, "eval": {}}).endswith("4322 tokens/s at 41% of the peak")


def test_json_is_whole_or_not_there(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"value": 1.5})
    with pytest.raises(UserError, match="not JSON compliant"):
        write_json(path, {"value": math.inf})
    assert json.loads(path.read_text()) == {"value": 1.5}


def test_the_environment_names_libraries_and_no_person_or_place():
    found = environment()
    assert found["versions"]["torch"].startswith("2.") and found["machine"]["cores"] >= 1
    assert set(found["git"]) == {"commit", "dirty", "diff"}
    assert platform.node() not in found["machine"].values() and str(Path.home()) not in json.dumps(found)
