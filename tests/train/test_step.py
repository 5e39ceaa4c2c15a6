"""A step as an artifact: what is loaded for it, and that the model it saves is the one it trained."""

import json

import pytest
import torch
from conftest import read_lines
from safetensors.torch import load_file

from sdpo.model import hub
from sdpo.train.runner import Runner


def keys(folder):
    """The keys of S and of every M_t."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return [manifest["model_key"], *(step["key"] for step in manifest["steps"])]


def test_s_is_loaded_once_and_no_m_t_at_all(run, toy, monkeypatch):
    """Full weights, start=previous, reference=previous: the model in memory is S, M_1, M_2 and M_3 in turn.

    As each of them it scores the held-out pairs and the probes; as S to M_2 it also scores the next chunk as the
    reference, and is trained. The evaluation and the trajectory read these log-probs from the store.
    """
    loaded, load = [], hub.load

    def counted(folder, *arguments, **options):
        loaded.append(folder)
        return load(folder, *arguments, **options)

    monkeypatch.setattr(hub, "load", counted)
    run("split=by_source", "reference=previous", "evaluate=[preference]")
    assert loaded == [toy / "model"]


@pytest.mark.parametrize("save_dtype", ["fp32", "bf16"])
def test_weights_that_stay_in_memory_are_those_of_the_file(run, monkeypatch, tmp_path, save_dtype):
    """A run that loads every start from its file ends in the same bytes, log-probs and losses."""
    overrides = ["split=by_source", f"save_dtype={save_dtype}", "evaluate=[preference]", "optim.moments=carry"]
    kept = run(*overrides)
    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "another"))
    load = Runner.load_to_train

    def reload(self, spec):
        self.release()
        return load(self, spec)

    monkeypatch.setattr(Runner, "load_to_train", reload)
    loaded = run(*overrides, name="loaded")
    for t in ("1", "2", "3"):
        files = [load_file(folder / "steps" / t / "model.safetensors") for folder in (kept, loaded)]
        assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    losses = [[entry["loss"] for entry in read_lines(folder, "train")] for folder in (kept, loaded)]
    measures = [[entry["eval"] for entry in read_lines(folder, "eval")] for folder in (kept, loaded)]
    assert losses[0] == losses[1] and measures[0] == measures[1]


def test_a_placebo_that_needs_s_does_not_replace_the_model_that_trains(run, monkeypatch, tmp_path):
    """S's log-probs of chunk 2 are in the store if all of its pairs are probes; else S is loaded to score them."""
    overrides = ["split=by_source", "reference=previous", "reference.placebo=mean_shift", "evaluate=[]"]
    known = run(*overrides, name="known")
    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "another"))
    scored = run(*overrides, "probe.num_pairs=4", name="scored")
    assert keys(known) == keys(scored)
    for t in (1, 2, 3):
        weights = [(folder / "steps" / str(t) / "model.safetensors").read_bytes() for folder in (known, scored)]
        assert weights[0] == weights[1]
