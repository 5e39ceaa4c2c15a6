"""Metrics and JSON files of a run, and the description of what it ran on."""

import json
import math
import platform
from pathlib import Path

import pytest

from sdpo.errors import UserError
from sdpo.metrics import Recorder, flatten
from sdpo.run.folder import write_json
from sdpo.run.provenance import environment

TRAIN = {"kind": "train", "t": 1, "update": 3, "loss": 0.1 + 0.2, "pairs": 32}
EVAL = {"kind": "eval", "t": 1, "eval": {"lab/gold": {"value": 0.5, "low": None, "high": 0.75, "n": 4}}}


def test_metrics_can_be_read_at_once_and_start_empty(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"of": "an earlier attempt"}\n')
    with Recorder(tmp_path) as recorder:
        recorder.log(TRAIN)
        recorder.log(EVAL)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [TRAIN, EVAL]
    assert not (tmp_path / "wandb").exists()


def test_an_error_names_a_number_that_is_not_finite(tmp_path):
    with Recorder(tmp_path) as recorder:
        with pytest.raises(UserError, match="step 1, update 3: train/loss is not finite"):
            recorder.log(TRAIN | {"loss": math.nan})
        recorder.log(TRAIN | {"loss": None})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None


def test_names_of_flat_entries():
    assert flatten(TRAIN) == {"train/loss": 0.1 + 0.2, "train/pairs": 32}
    assert flatten(EVAL) == {
        "eval/lab/gold": 0.5,
        "eval/lab/gold/low": None,
        "eval/lab/gold/high": 0.75,
        "eval/lab/gold/n": 4,
    }
    assert flatten({"kind": "step", "t": 1, "sources": {"orca": 7}}) == {"step/sources/orca": 7}


def test_json_is_whole_or_not_there(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"value": 1.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"value": math.inf})
    assert json.loads(path.read_text()) == {"value": 1.5}


def test_the_environment_names_libraries_and_no_person_or_place():
    found = environment()
    assert found["versions"]["torch"].startswith("2.") and found["machine"]["cores"] >= 1
    assert set(found["git"]) == {"commit", "dirty", "diff"}
    assert platform.node() not in found["machine"].values() and str(Path.home()) not in json.dumps(found)
