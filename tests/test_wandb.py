"""W&B's offline file holds every number of metrics.jsonl and how the run ended."""

import json
import os
import struct
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from wandb.proto import wandb_internal_pb2

from sdpo.config import Config, Record
from sdpo.record import Recorder, flatten

CONFIG = Config(record=Record(wandb=True, project="trial"), split={"name": "random"}, seed=7)
CHOICES = {"split": "random", "loss": "dpo"}
BLOCK = 32768  # bytes; LevelDB's log format, after W&B's own header of 7 bytes


def offline_records(folder):
    """The records of the one offline run below `folder`, decoded from LevelDB's log format."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, position, body = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position < len(data):
        if BLOCK - position % BLOCK < 7:  # no room for a header: the block's end is zeros
            position += BLOCK - position % BLOCK
        _, length, part = struct.unpack_from("<IHB", data, position)  # checksum, bytes, which part
        body += data[position + 7 : position + 7 + length]
        position += 7 + length
        if part in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(body)
            body = b""


def mirrored(folder):
    """Of the offline run: its start, its logged rows, and its exit code (None where it never ended)."""
    records = list(offline_records(folder))
    rows = [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    (start,) = (record.run for record in records if record.HasField("run"))
    exits = [record.exit.exit_code for record in records if record.HasField("exit")]
    return start, rows, exits[0] if exits else None


def entries(num_updates):
    """What a run of two steps logs, with numbers that would show any rounding."""
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
    """Every number of metrics.jsonl stands in the same row of the offline run, and nothing else does."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    _, rows, _ = mirrored(folder)
    assert len(rows) == len(lines)
    for row, line in zip(rows, lines, strict=True):
        numbers = {name: value for name, value in flatten(line).items() if value is not None}
        assert {name: row.pop(name) for name in numbers} == numbers
        assert row.pop("t") == line["t"]
        assert set(row) == {"updates", "_step", "_runtime", "_timestamp"}
    return rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "random-seed7"
    with Recorder(folder, CONFIG, choices=CHOICES, sweep="controls") as recorder:
        for entry in entries(num_updates=200):
            recorder.log(entry)
    return folder


def test_every_number_is_mirrored(finished):
    rows = check_agreement(finished)
    updates = [row["updates"] for row in rows]
    assert updates == sorted(updates) and updates[-1] == 400
    (path,) = finished.glob("wandb/offline-run-*/*.wandb")
    assert path.stat().st_size > 2 * BLOCK  # the reader above has met records that cross blocks


def test_the_run_says_what_it_is(finished):
    start, _, exit_code = mirrored(finished)
    assert exit_code == 0
    assert (start.project, start.run_group, start.display_name) == ("trial", "controls", "random-seed7")
    assert list(start.tags) == ["split=random", "loss=dpo"]
    config = {update.key: json.loads(update.value_json) for update in start.config.update}
    assert config["choices"] == CHOICES
    assert {name: config[name] for name in asdict(CONFIG)} == asdict(CONFIG)
    assert start.host == "" and not list(finished.glob("wandb/latest-run"))


def test_a_failed_run_is_shown_as_failed_and_its_repeat_replaces_it(tmp_path):
    with pytest.raises(RuntimeError), Recorder(tmp_path, CONFIG, choices=CHOICES) as recorder:
        recorder.log({"kind": "train", "t": 1, "update": 1, "loss": 0.5})
        raise RuntimeError
    failed, _, exit_code = mirrored(tmp_path)
    assert exit_code == 1
    check_agreement(tmp_path)
    with Recorder(tmp_path, CONFIG, choices=CHOICES) as recorder:
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
from sdpo.record import Recorder
config = Config(record=Record(wandb=True, mode={mode!r}))
with Recorder(Path({str(folder)!r}), config, choices={{}}) as recorder:
    recorder.log({{"kind": "train", "t": 1, "update": 1, "loss": 0.5}})
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[1],
        env=kept | {"HOME": str(folder), "NETRC": str(folder / "none")} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_nothing_is_asked_and_no_other_run_is_joined(tmp_path):
    another = {"WANDB_RUN_ID": "another", "WANDB_RESUME": "must", "WANDB_SWEEP_ID": "theirs"}
    child = record_in_a_child(tmp_path, "offline", WANDB_MODE="online", WANDB_PROJECT="another", **another)
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")
    start, _, exit_code = mirrored(tmp_path)
    assert (start.project, start.sweep_id, start.resume, exit_code) == ("sdpo", "", False, 0)
    assert start.run_id != "another"
    check_agreement(tmp_path)


def test_online_without_credentials_is_one_sentence(tmp_path):
    child = record_in_a_child(tmp_path, "online")
    assert child.returncode == 1
    assert "ValueError: record.mode=online finds no W&B credentials: set WANDB_API_KEY" in child.stderr
