"""train.py as the user sees it: errors of the user in one line and before any work, other errors with a traceback."""

import errno
import os
import runpy
import subprocess
import sys

import pytest
from conftest import CHECKOUT
from safetensors import SafetensorError

from sdpo.launch import local

TRAIN = [sys.executable, str(CHECKOUT / "train.py"), "model=hub", "model.path=x"]
DATA = ["data=hub", "data.train=[a]"]


def refused(folder, *arguments, **environment):
    """The one line that train.py prints before it fails."""
    ended = subprocess.run(
        [*TRAIN, *arguments], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert not list(folder.glob("out/*"))
    return ended.stderr


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("++typo=1", "error: unknown key typo; the configuration has model, data"),
        ("loss.betta=1", "error: sdpo.variants.loss.dpo: unknown key betta; dpo has beta, label_smoothing"),
        ("loss=foo", "error: loss has no 'foo'; it has apo_down, apo_zero"),
        ("lss=dpo", "error: unknown key lss; the configuration has hydra, model"),
        ("seed", "error: Error parsing override 'seed' missing EQUAL"),
        ("--local_rank=0", "error: train.py starts its own ranks, but --local_rank=0 says that it is one"),
    ],
)
def test_a_wrong_argument_is_an_error_of_one_line(tmp_path, argument, sentence):
    assert refused(tmp_path, *DATA, argument).startswith(sentence)


def test_a_rank_launcher_is_refused(tmp_path):
    assert refused(tmp_path, RANK="3").startswith("error: train.py starts its own ranks, but RANK says that it is one")


def test_a_missing_value_is_asked_for(tmp_path):
    assert refused(tmp_path, "data=hub") == "error: data.train has no value; set data.train=[...]\n"


FULL = "No space left on device"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "of pyarrow"), f"error: {FULL}; free some space, then start the same command again"),
        (SafetensorError(f"I/O error: {FULL} (os error 28)"), f"error: {FULL}; free some space, then"),
        (
            OSError(errno.EACCES, "", "out/metrics.jsonl"),
            "error: Permission denied: out/metrics.jsonl; change the permissions or use another folder, then",
        ),
    ],
)
def test_a_condition_of_the_disk_is_an_error_of_one_line(monkeypatch, error, message):
    with pytest.raises(SystemExit) as end:
        fail_with(monkeypatch, error)
    assert end.value.code.startswith(message) and "\n" not in end.value.code


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), FileNotFoundError("x"), KeyError("x")])
def test_another_error_keeps_its_traceback(monkeypatch, error):
    with pytest.raises(type(error)) as end:
        fail_with(monkeypatch, error)
    assert end.value is error


def fail_with(monkeypatch, error):
    """Run train.py in this process, where the first thing that it does raises this error."""

    def fail():
        raise error

    monkeypatch.setattr(local, "refuse_ranks", fail)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    runpy.run_path(str(CHECKOUT / "train.py"), run_name="__main__")
