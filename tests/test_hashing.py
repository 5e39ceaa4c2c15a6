"""Hashes of weights: by tensor and in pieces, whatever files they are in, and never kept for a file that changed."""

import hashlib
import json

import numpy as np
import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file

from sdpo.errors import UserError
from sdpo.model import hub
from sdpo.store import artifacts, hashing, inventory
from sdpo.store.artifacts import Store, check


@pytest.fixture
def model(tmp_path):
    random_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_hash_worked_by_hand(monkeypatch):
    monkeypatch.setattr(hashing, "PIECE", 4)
    tensor = np.arange(6, dtype=np.uint8)
    pieces = [hashlib.sha256(piece).hexdigest() for piece in (b"\0\1\2\3", b"\4\5")]
    expected = hashlib.sha256(json.dumps(["U8", [2, 3], pieces]).encode()).hexdigest()
    empty = hashlib.sha256(b'["U8", [0], []]').hexdigest()
    blocks = {"a": hashing.Block("U8", [2, 3], tensor.data), "b": hashing.Block("U8", [0], tensor[:0].data)}
    assert hashing.hash_blocks(blocks) == {"a": expected, "b": empty}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_have_one_hash_in_memory_in_one_file_and_in_several(tmp_path, dtype):
    model = random_model().to(dtype)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    weights = load_file(tmp_path / "one" / "model.safetensors")
    hashes = {hub.fingerprint_files(tmp_path / name) for name in ("one", "many")}
    assert hashes == {hub.fingerprint_weights(weights, dtype)}
    assert hub.fingerprint(tmp_path / "one") == hub.fingerprint(tmp_path / "many")
    renamed = {name + "x": tensor for name, tensor in weights.items()}
    reshaped = {name: tensor[None] for name, tensor in weights.items()}
    rounded = hub.fingerprint_weights(weights, torch.bfloat16 if dtype == torch.float32 else torch.float32)
    others = {hub.fingerprint_weights(renamed, dtype), hub.fingerprint_weights(reshaped, dtype), rounded}
    assert len(others - hashes) == 3


@pytest.mark.parametrize("position", ["header", "first", "last"])
def test_a_byte_that_changed_is_noticed_at_once(model, position):
    """The file keeps its size, and the change comes right after the hash was computed."""
    path = model / "model.safetensors"
    before = hashing.read_weights(path)
    content = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    content[{"header": content.index(b"__metadata__"), "first": begin, "last": -1}[position]] ^= 1
    path.write_bytes(content)
    assert hashing.read_weights(path) != before
    assert hashing.hash_files(model, [path]) != {"model.safetensors": hashing.hash_json(before)}


def test_a_file_that_is_not_safetensors_has_a_hash_too(tmp_path):
    path, seen = tmp_path / "a.safetensors", set()
    for content in (b"", b"\1", b"\xff" * 90, (8).to_bytes(8, "little") + b"[1,2,3] more"):
        path.write_bytes(content)
        seen.add(hashing.hash_weights([path]))
    assert len(seen) == 4


def test_an_unchanged_file_is_hashed_once(model, monkeypatch):
    known = hub.fingerprint(model)
    monkeypatch.setattr(hashing, "hash_blocks", lambda blocks: pytest.fail("hashed again"))
    assert hub.fingerprint(model) == known


def test_what_another_version_stored_is_not_found_and_refused_by_its_version(tmp_path, monkeypatch):
    """Its hashes are others, so that a comparison would call it changed."""
    store, build = Store(tmp_path), lambda folder: save_file({"a": torch.zeros(1)}, folder / "a.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "NUMERICS_VERSION", 5)
        old = store.make("step", {}, build)
    for numerics in (5, None):  # releases up to 5 did not write it down
        manifest = json.loads((old.folder / "manifest.json").read_text()) | {"files": {"a.safetensors": "0" * 64}}
        manifest.pop("numerics", None) if numerics is None else None
        (old.folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="was stored by another version of sdpo"):
            check(old)
    new = store.make("step", {}, build)
    assert not new.reused and new.key != old.key
    assert inventory.verify(store) == "1 artifacts are what was stored; 1 of another version of sdpo were not read"
