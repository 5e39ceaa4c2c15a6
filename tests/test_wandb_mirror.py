"""W&B's offline file has every number of metrics.jsonl and how the run ended."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
from conftest import CHECKOUT

from analysis import from_wandb
from sdpo.config import Config, Record
from sdpo.errors import UserError
from sdpo.metrics import Recorder, flatten
from sdpo.wandb_mirror import WandbMirror

CONFIG = Config(record=Record(wandb=True, project="trial"), split={"name": "random"}, seed=7)
CHOICES = {"split": "random", "loss": "dpo"}


def mirrored(folder):
    """The start record, the rows and the exit code (None without an end) of the only offline run below `folder`."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    records = list(from_wandb.records(path))
    (start,) = (record.run for record in records if record.HasField("run"))
    exits = [record.exit.exit_code for record in records if record.HasField("exit")]
    return start, from_wandb.offline(path).rows, exits[0] if exits else None


def entries(num_updates):
    """The entries of a run of two steps, with numbers that rounding would change."""
    yield {
        "kind": "eval",
        "t": 0,
        "eval": {"lab/gold": {"value": 1 / 3, "low": None, "high": 1e-300, "n": 9}},
    }
    for t in (1, 2):
        for update in range(1, num_updates + 1):
            yield {
                "kind": "train",
                "t": t,
                "update": update,
                "loss": 0.1**update + t / 7,
                "tokens": 2**53 + t,
            }
        yield {"kind": "step", "t": t, "sources": {"orca": t}, "reused": False, "gamma_ref_mean": -1 / 3}
        yield {"kind": "eval", "t": t, "eval": {"preference/orca/gamma": {"value": t / 3, "n": 5}}}


def check_agreement(folder):
    """Each row of the offline run has the numbers of the same line of metrics.jsonl and no others."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    _, rows, _ = mirrored(folder)
    assert len(rows) == len(lines)
    for row, line in zip(rows, lines, strict=True):
        numbers = {name: value for name, value in flatten(line).items() if value is not None}
        assert {name: row.pop(name) for name in numbers} == numbers
        assert row.pop("t") == line["t"]
        assert set(row) == {"updates", "_step", "_runtime", "_timestamp"}
    return rows


def recorder_of(folder, sweep=None):
    return Recorder(folder, WandbMirror(folder, CONFIG, "stepwise", CHOICES, sweep))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "random-seed7"
    with recorder_of(folder, "controls") as recorder:
        for entry in entries(num_updates=200):
            recorder.log(entry)
    return folder


def test_every_number_is_mirrored(finished):
    rows = check_agreement(finished)
    updates = [row["updates"] for row in rows]
    assert updates == sorted(updates) and updates[-1] == 400
    (path,) = finished.glob("wandb/offline-run-*/*.wandb")
    assert path.stat().st_size > 2 * from_wandb.BLOCK  # so some records cross blocks
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    for line, found in zip(lines, from_wandb.entries(mirrored(finished)[1]), strict=True):
        assert {name: found[name] for name in line if name != "eval"} == {k: v for k, v in line.items() if k != "eval"}
        for name, measure in line.get("eval", {}).items():
            assert found["eval"][name] == {"low": None, "high": None} | measure


def test_answers_are_a_table_with_a_column_per_model(tmp_path):
    def entry(t, text):
        return {"kind": "answers", "t": t, "answers": [{"id": 7, "turns": ["what?"], "answers": [text]}]}

    with recorder_of(tmp_path) as recorder:
        recorder.log(entry(0, "this"))
        recorder.log(entry(1, "that"))
    rows = mirrored(tmp_path)[1]
    (file,) = tmp_path.glob(f"wandb/offline-run-*/files/{rows[-1]['answers.path']}")
    table = json.loads(file.read_text())
    assert table["columns"] == ["id", "prompt", "M_0", "M_1"] and table["data"] == [["7", "what?", "this", "that"]]


def test_a_record_that_is_cut_off_is_left_out_and_other_files_are_refused(finished, tmp_path):
    (path,) = finished.glob("wandb/offline-run-*/*.wandb")
    (tmp_path / "cut.wandb").write_bytes(path.read_bytes()[:-3])
    assert len(list(from_wandb.records(tmp_path / "cut.wandb"))) == len(list(from_wandb.records(path))) - 1
    (tmp_path / "other.wandb").write_text("something else")
    with pytest.raises(UserError, match="was not written by the W&B client"):
        from_wandb.offline(tmp_path / "other.wandb")


def test_the_run_has_its_names_and_configuration(finished):
    start, _, exit_code = mirrored(finished)
    assert exit_code == 0
    assert (start.project, start.run_group, start.display_name) == ("trial", "controls", "random-seed7")
    assert list(start.tags) == ["split=random", "loss=dpo"]
    config = {update.key: json.loads(update.value_json) for update in start.config.update}
    assert (config["arm"], config["choices"]) == ("stepwise", CHOICES)
    assert {name: config[name] for name in asdict(CONFIG)} == asdict(CONFIG)
    assert start.host == "" and not list(finished.glob("wandb/latest-run"))


def test_a_failed_run_is_marked_as_failed_and_the_next_attempt_replaces_it(tmp_path):
    with pytest.raises(RuntimeError), recorder_of(tmp_path) as recorder:
        recorder.log({"kind": "train", "t": 1, "update": 1, "loss": 0.5})
        raise RuntimeError
    failed, _, exit_code = mirrored(tmp_path)
    assert exit_code == 1
    check_agreement(tmp_path)
    with recorder_of(tmp_path) as recorder:
        for entry in entries(num_updates=2):
            recorder.log(entry)
    repeated, _, exit_code = mirrored(tmp_path)
    assert exit_code == 0 and repeated.run_id == failed.run_id
    check_agreement(tmp_path)


def record_in_a_child(folder, mode, **environment):
    """Record one entry in a process without a terminal, standard input or credentials."""
    script = f"""
from pathlib import Path
from sdpo.config import Config, Record
from sdpo.metrics import Recorder
from sdpo.wandb_mirror import WandbMirror
config = Config(record=Record(wandb=True, mode={mode!r}))
folder = Path({str(folder)!r})
with Recorder(folder, WandbMirror(folder, config, "", {{}})) as recorder:
    recorder.log({{"kind": "train", "t": 1, "update": 1, "loss": 0.5}})
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=CHECKOUT,
        env=kept | {"HOME": str(folder), "NETRC": str(folder / "none")} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_no_input_is_needed_and_no_other_run_is_joined(tmp_path):
    another = {"WANDB_RUN_ID": "another", "WANDB_RESUME": "must", "WANDB_SWEEP_ID": "theirs"}
    child = record_in_a_child(tmp_path, "offline", WANDB_MODE="online", WANDB_PROJECT="another", **another)
    (copy,) = (tmp_path / "wandb").glob("offline-run-*")
    assert (child.returncode, child.stdout) == (0, "")
    assert child.stderr == f"to upload W&B's copy: wandb sync {copy}\n"
    start, _, exit_code = mirrored(tmp_path)
    assert (start.project, start.sweep_id, start.resume, exit_code) == ("sdpo", "", False, 0)
    assert start.run_id != "another"
    check_agreement(tmp_path)


def test_online_without_credentials_is_one_sentence(tmp_path):
    child = record_in_a_child(tmp_path, "online")
    assert child.returncode == 1
    assert "UserError: record.mode=online finds no W&B credentials: set WANDB_API_KEY" in child.stderr
