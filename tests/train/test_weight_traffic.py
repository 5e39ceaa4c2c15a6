"""What a step costs besides its passes: how often weights are read, hashed and copied, counted in bytes."""

import hashlib
import os
from collections import Counter

import pytest
import torch
import transformers
from conftest import byte_tokenizer, random_model

from sdpo.store import hashing


@pytest.fixture
def model(tmp_path):
    """A model whose weights outweigh everything else that a small run reads and hashes."""
    random_model(vocab_size=2000, hidden_size=64).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def traffic(monkeypatch):
    """Bytes so far: `read` by loading a model, `hashed` of anything, `copied` of tensors that are shaped as weights."""
    counts, shapes = Counter(), {param.shape for param in random_model(vocab_size=2000, hidden_size=64).parameters()}
    load, sha256, digest = transformers.AutoModelForCausalLM.from_pretrained, hashlib.sha256, hashlib.file_digest
    move = torch.Tensor.to

    def loaded(folder, *args, **options):
        counts["read"] += sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        return load(folder, *args, **options)

    def hashed(data=b"", **options):
        counts["hashed"] += len(data)
        return sha256(data, **options)

    def file_hashed(file, name):
        counts["hashed"] += os.fstat(file.fileno()).st_size
        return digest(file, name)

    def moved(self, *args, **options):
        result = move(self, *args, **options)
        if self.shape in shapes and result.data_ptr() != self.data_ptr():
            counts["copied"] += result.nbytes
        return result

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loaded)
    monkeypatch.setattr(hashlib, "sha256", hashed)
    monkeypatch.setattr(hashlib, "file_digest", file_hashed)
    monkeypatch.setattr(torch.Tensor, "to", moved)
    monkeypatch.setattr(hashing, "_known", {})
    return counts


def test_every_byte_of_weights_is_read_and_hashed_at_most_once(run, model, traffic):
    """Three steps from S. Read: S. Hashed: S, M_1, M_2 and M_3, and less than one model of everything else.

    Nothing copies weights: they are trained where they are, and written from there.
    """
    folder = run(f"model.path={model}", "split=by_source", "reference=previous", "evaluate=[preference]")
    size = (folder / "steps" / "3" / "model.safetensors").stat().st_size
    assert size <= traffic["read"] < 2 * size
    assert 4 * size <= traffic["hashed"] + 4 * 10_000 < 5 * size  # 10 kB: at least the length of a header
    assert traffic["copied"] == 0
