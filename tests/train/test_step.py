"""A step as an artifact: what is loaded for it, and that the model it saves is the one it trained."""

import json

from sdpo.model import hub
from sdpo.train import probes


def keys(folder):
    """The keys of S and of every M_t."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return [manifest["model_key"], *(step["key"] for step in manifest["steps"])]


def test_each_start_is_loaded_once_to_train_and_m_t_is_never_loaded_to_be_scored(run, toy, monkeypatch):
    """Two steps, full weights in fp32, reference=previous. The loads are, in order:

    1. S, to score the held-out pairs and the probes of both chunks before any training;
    2. S, to train step 1. It first scores its chunk as the reference. Trained, it is M_1 bit for bit, and scores the
       held-out pairs and probes as M_1;
    3. M_1, to train step 2, likewise: it scores chunk 2 as the reference, and in the end everything as M_2.

    The evaluation of S, M_1 and M_2 and the trajectory read these log-probs from the store.
    """
    loaded, load = [], hub.load

    def counted(folder, *arguments, **options):
        loaded.append(folder)
        return load(folder, *arguments, **options)

    monkeypatch.setattr(hub, "load", counted)
    files = [toy / f"{source}.jsonl" for source in "ab"]
    folder = run(f"data.train=[{files[0]},{files[1]}]", "reference=previous", "evaluate=[preference]")
    assert loaded == [toy / "model", toy / "model", (folder / "steps" / "1").resolve()]


def test_a_placebo_that_needs_s_does_not_replace_the_model_that_trains(run, monkeypatch, tmp_path):
    """S's log-probs of chunk 2 are in the store if all of its pairs are probes; else S is loaded to score them."""
    overrides = ["split=by_source", "reference=previous", "reference.placebo=mean_shift", "evaluate=[]"]
    known = run(*overrides, name="known")
    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "another"))
    monkeypatch.setattr(probes, "NUM_PROBES", 4)
    scored = run(*overrides, name="scored")
    assert keys(known) == keys(scored)
    for t in (1, 2, 3):
        weights = [(folder / "steps" / str(t) / "model.safetensors").read_bytes() for folder in (known, scored)]
        assert weights[0] == weights[1]
