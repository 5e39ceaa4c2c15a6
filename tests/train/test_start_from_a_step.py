"""A step of another run as S counts by what its key says: weights, configuration and tokenizer."""

import shutil

import pytest


@pytest.mark.parametrize("settings", [["optim.moments=carry"], ["tune=lora"]])
def test_what_lies_beside_the_weights_of_s_changes_nothing(run, monkeypatch, tmp_path, settings):
    step = run("split=all_at_once", "evaluate=[]", *settings, name="earlier") / "steps" / "1"
    bare = tmp_path / "bare"
    shutil.copytree(step, bare, ignore=shutil.ignore_patterns("manifest.json", "moments-*", "adapter"))
    assert len(list(bare.iterdir())) < len(list(step.iterdir()))
    found = []
    for place in (step, bare):
        monkeypatch.setenv("SDPO_STORE", str(tmp_path / f"store-{place.name}"))
        folder = run("split=all_at_once", "evaluate=[]", *settings, f"model.path={place}", name=f"from-{place.name}")
        (weights,) = (folder / "steps" / "1").glob("model*.safetensors")
        found.append(((folder / "steps" / "1").resolve().name, weights.read_bytes()))
    assert found[0] == found[1]
