"""What a run on the toy sources starts from, and a fault in it, for tests of what happens before its first update."""

import torch
from conftest import TINY, byte_tokenizer, compose
from transformers import AutoConfig, AutoModelForSequenceClassification

from sdpo.store.artifacts import Store
from sdpo.train import setup
from sdpo.train.runner import Runner


def prepare(toy, folder, *overrides):
    """The configuration and inputs of a run on the toy, with its store in `folder`."""
    files = ",".join(str(toy / f"{source}.jsonl") for source in "abc")
    base = ["model=local", f"model.path={toy / 'model'}", "data=local", f"data.train=[{files}]"]
    base += ["data.template=plain", "optim.lr=3e-3", "optim.pairs_per_update=12"]
    settings = compose(*base, *overrides)
    return settings, setup.prepare(settings, Store(folder))


def reward_model(folder, template):
    """Write a tiny reward model with a chat template of its own and no padding token; returns its folder."""
    torch.manual_seed(1)
    shape = AutoConfig.for_model("llama", **{**TINY, "pad_token_id": None}, num_labels=1)
    AutoModelForSequenceClassification.from_config(shape).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def swap_while_loading(monkeypatch):
    """The weights that train have the query projections of two layers swapped."""
    load = Runner.load_to_train

    def swapped(self, spec):
        engine = load(self, spec)
        first, second = (layer.self_attn.q_proj.weight.data for layer in engine.scorer.model.model.layers[:2])
        first[:], second[:] = second.clone(), first.clone()
        return engine

    monkeypatch.setattr(Runner, "load_to_train", swapped)
