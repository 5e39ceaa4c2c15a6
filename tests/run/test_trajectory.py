"""trajectory.parquet and the windows of the manifest: which model was scored when; probing changes no weights."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import read_lines
from safetensors.torch import load_file

from sdpo.model.hub import fingerprint_weights

FLAT = ["optim.schedule=constant", "optim.warmup=0", "split=all_at_once"]
LOGPS = ["chosen_logp", "rejected_logp"]


def followed(folder, **where):
    """The rows of a trajectory with these values, indexed by id."""
    table = pd.read_parquet(folder / "trajectory.parquet")
    for column, value in where.items():
        table = table[table[column] == value]
    return table.set_index("id")


def windows(folder, t=1):
    return json.loads((folder / "manifest.json").read_text())["steps"][t - 1]["windows"]


def weights_hash(folder):
    return fingerprint_weights(load_file(folder / "model.safetensors"), torch.float32)


def test_a_policy_inside_a_step_is_that_of_a_step_that_ends_there(run):
    once = run(*FLAT, name="once")
    epoch = len(read_lines(once, "train"))
    twice = run(*FLAT, "optim.epochs=2", f"probe.every={epoch}", name="twice")
    inside, ended = followed(twice, role="policy", update=epoch), followed(once, t=1, role="policy")
    np.testing.assert_array_equal(inside[LOGPS], ended.loc[inside.index, LOGPS])
    assert (inside["held_out"] | inside["seen"]).all() and set(inside["chunk"]) == {0, 1}


def test_probing_inside_a_step_changes_its_key_and_not_its_weights(run):
    plain, probed = run(*FLAT, name="plain"), run(*FLAT, "probe.every=3", name="probed")
    assert (plain / "steps/1").resolve() != (probed / "steps/1").resolve()
    assert weights_hash(plain / "steps/1") == weights_hash(probed / "steps/1")
    again = run(*FLAT, "probe.every=3", name="again")  # found in the store, with the same trajectory
    assert json.loads((again / "summary.json").read_text())["reused_steps"] == 1
    pd.testing.assert_frame_equal(followed(again), followed(probed))


def test_every_reference_is_followed_and_named(run, toy):
    folder = run("reference=periodic", "reference.updates=2", "probe.every=2")
    updates = [entry["update"] for entry in read_lines(folder, "train") if entry["t"] == 2]
    assert updates == [1, 2, 3]
    moved = followed(folder, t=2, role="reference", update=2)
    np.testing.assert_array_equal(moved[LOGPS], followed(folder, t=2, role="policy", update=2)[LOGPS])
    first, second = windows(folder, t=2)
    assert [(w["first_update"], w["num_updates"]) for w in (first, second)] == [(1, 2), (3, 1)]
    assert first["weights_hash"] == weights_hash(folder / "steps/1") != second["weights_hash"]
    assert windows(folder, t=1)[0]["weights_hash"] == weights_hash(toy / "model")

    start = followed(folder, t=2, role="reference", update=0)
    assert set(start["model"]) == {"M_1"} and set(start["chunk"]) == {0, 1, 2, 3}
    np.testing.assert_array_equal(start[LOGPS], followed(folder, t=1, role="policy", update=-1)[LOGPS])
    own = start[start["chunk"] == 2]
    gamma_ref = (own["chosen_logp"] - own["rejected_logp"]).mean()  # all pairs of the toy are probes
    assert first["gamma_ref_mean"] == pytest.approx(gamma_ref, abs=1e-5)
    assert not own["seen"].any() and start[start["chunk"] == 1]["seen"].all()
    assert moved[moved["chunk"] == 2]["seen"].sum() == 16  # two updates of 8 pairs
