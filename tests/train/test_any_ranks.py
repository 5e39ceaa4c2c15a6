"""launch.any_ranks: one number of ranks goes on with a step that another one has begun or finished.

In this process one rank does the work; the keys have the setting launch.ranks.
"""

import json
import os
import signal

import pytest
from conftest import read_lines

from sdpo.train.loop import TrainingLoop

STEPS = ["split=by_source", "evaluate=[]"]


def keys(folder):
    """The keys of M_1 to M_T."""
    return [step["key"] for step in json.loads((folder / "manifest.json").read_text())["steps"]]


@pytest.fixture
def taken(monkeypatch):
    """The updates that this process took, a list; a run is asked to stop when it has as many as `taken.limit`."""

    class Taken(list):
        limit = None

    take, updates = TrainingLoop._take_update, Taken()

    def counted(self, number, *arguments):
        updates.append(number)
        if len(updates) == updates.limit:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, number, *arguments)

    monkeypatch.setattr(TrainingLoop, "_take_update", counted)
    return updates


def test_finished_steps_are_taken_on_request(run, capsys):
    two = run("launch.ranks=2", name="two")
    one = run("launch.any_ranks=true", name="one")
    assert keys(one) == keys(two)
    assert "step 1 is taken from the store as 2 ranks made it (launch.any_ranks)" in capsys.readouterr().err
    assert {step["reused"] for step in json.loads((one / "manifest.json").read_text())["steps"]} == {True}
    assert not set(keys(run(name="own"))) & set(keys(two))


def test_a_step_that_was_begun_goes_on_and_has_a_key_of_its_own(run, taken):
    taken.limit = 2
    with pytest.raises(SystemExit):
        run(*STEPS, "launch.ranks=2", name="begun")
    mixed = run(*STEPS, "launch.any_ranks=true", name="mixed")
    assert taken == [0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert not list((mixed.parent / "store" / "partial").iterdir())
    whole = run(*STEPS, name="whole")
    one, other = ([entry["loss"] for entry in read_lines(folder, "train")] for folder in (whole, mixed))
    assert one == other and not set(keys(mixed)) & set(keys(whole))
    again = run(*STEPS, "launch.any_ranks=true", "launch.ranks=4", name="again")
    assert keys(again) == keys(mixed)
