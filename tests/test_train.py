"""train.py as a user meets it: what it refuses, in one line, before any work and without a trace."""

import os
import subprocess
import sys

import pytest
from conftest import CHECKOUT

TRAIN = [sys.executable, str(CHECKOUT / "train.py"), "model=hub", "model.path=x"]
DATA = ["data=hub", "data.train=[a]"]


def refused(folder, *arguments, **environment):
    """The one line that train.py ends with."""
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
        ("loss.betta=1", "error: unknown key loss.betta; loss has name, beta, label_smoothing"),
        ("loss=foo", "error: loss has no 'foo'; it has apo_down, apo_zero"),
        ("lss=dpo", "error: unknown key lss; the configuration has hydra, model"),
        ("seed", "error: Error parsing override 'seed' missing EQUAL"),
        ("--local_rank=0", "error: train.py starts its own ranks, but --local_rank=0 says that it is one"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, argument, sentence):
    assert refused(tmp_path, *DATA, argument).startswith(sentence)


def test_a_rank_launcher_is_refused(tmp_path):
    assert refused(tmp_path, RANK="3").startswith("error: train.py starts its own ranks, but RANK says that it is one")


def test_what_only_the_user_knows_is_asked_for(tmp_path):
    assert refused(tmp_path, "data=hub") == "error: data.train has no value; set data.train=[...]\n"
