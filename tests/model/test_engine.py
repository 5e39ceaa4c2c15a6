"""Two ranks, with and without DeepSpeed ZeRO: same loss curve, and weights that load."""

import json
import math
import os
import subprocess
import sys

import forked as forked_ranks
import numpy as np
import pandas as pd
import pytest
import ranks
import torch
from conftest import CHECKOUT, compose, random_model, read_lines
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sdpo import config, distributed, validate
from sdpo.errors import UserError
from sdpo.model import engine, hub
from sdpo.model.engine import has_bf16, open_engine
from sdpo.model.hub import fingerprint_weights
from sdpo.model.logprobs import Scorer
from sdpo.model.packing import pack
from sdpo.types import TokenPair


@pytest.fixture(scope="module")
def two_steps(toy):
    overrides = ["data=local", f"data.train=[{toy / 'a.jsonl'},{toy / 'b.jsonl'}]", "data.template=plain"]
    overrides += ["model=local", f"model.path={toy / 'model'}", "optim.pairs_per_update=8", "optim.lr=3e-3"]
    overrides += ["reference=mixed", "reference.updates=2", "reference.alpha=0.6", "probe.every=2"]
    return [*overrides, "optim.moments=carry", "evaluate=[preference]", "launch.device=cpu"]


def through_train_py(folder, *overrides):
    command = [sys.executable, str(CHECKOUT / "train.py"), f"hydra.run.dir={folder}", *overrides]
    environment = os.environ | {"SDPO_STORE": str(folder.with_suffix(".store"))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def forked(folder, *overrides):
    ranks.finish(folder, ranks.start(compose(*overrides), folder, folder.with_suffix(".store")))


def losses(folder):
    return [entry["loss"] for entry in read_lines(folder, "train")]


def followed(folder):
    """The log-probs of references and policy that were recorded inside the steps."""
    return pd.read_parquet(folder / "trajectory.parquet").query("update > 0")


def hashes(folder):
    """The weights hash of every step's first reference, which is the step's start."""
    steps = json.loads((folder / "manifest.json").read_text())["steps"]
    return [step["windows"][0]["weights_hash"] for step in steps]


def weights_hash(folder):
    return fingerprint_weights(load_file(folder / "model.safetensors"), torch.float32)


@pytest.fixture(scope="module")
def alone(two_steps, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    forked(folder, *two_steps)
    return folder


SLOW = [pytest.param(forked, stage, marks=pytest.mark.slow) for stage in ("off", "zero1", "zero2")]


@pytest.mark.parametrize(("train", "stage"), [(through_train_py, "zero3"), *SLOW])
def test_two_ranks_at_every_stage_give_the_curve_and_weights_of_one(alone, two_steps, toy, tmp_path, train, stage):
    """Among others pitfall T3 (see test_pitfalls.py): M_1 has its own log-probs, even divided over ranks."""
    together = tmp_path / "run"
    train(together, *two_steps, "launch.ranks=2", f"deepspeed={stage}")
    assert np.abs(np.subtract(losses(together), losses(alone))).max() < 1e-4
    inside = [followed(folder) for folder in (together, alone)]
    np.testing.assert_allclose(*(table[["chosen_logp", "rejected_logp"]] for table in inside), atol=2e-3)
    assert hashes(together) == [weights_hash(toy / "model"), weights_hash(together / "steps" / "1")]
    first = [entry["margin"] for entry in read_lines(together, "train") if entry["update"] == 1]
    assert first == [0.0, 0.0]
    for t in ("1", "2"):
        ours, theirs = (AutoModelForCausalLM.from_pretrained(folder / "steps" / t) for folder in (together, alone))
        for name, tensor in ours.state_dict().items():
            torch.testing.assert_close(tensor, theirs.state_dict()[name], atol=2e-4, rtol=0)


def update_with_unused_parameters():
    """The norm of an update, a parameter that no rank uses, and one that only the first rank uses."""
    model = random_model()
    model.unused, model.odd = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    settings = config.Optim(weight_decay=0.1)
    engine = open_engine(Scorer(model, "sdpa"), settings, "fp32", config.Deepspeed(), torch.device("cpu"))
    policy = engine.module(pack([TokenPair("a", *np.arange(3, 33, dtype=np.int32).reshape(3, 10))]))
    loss = (policy.rejected - policy.chosen).sum()
    engine.backward(loss + model.odd.sum() if distributed.is_main() else loss, last=True)
    return engine.update(0.1).item(), model.unused.tolist(), model.odd.tolist()


def test_parameters_that_no_rank_uses_stay_as_they_are():
    first, second = forked_ranks.on_ranks(2, update_with_unused_parameters)
    norm, unused, odd = first
    assert first == second and math.isfinite(norm)
    assert unused == [1.0, 1.0] and odd == pytest.approx([0.89, 0.89], abs=1e-4)  # 1 - .1 (decay .1 and a step of 1)


def test_stage_1_is_refused_in_bf16_where_its_gradients_are_whole_and_fp32():
    with pytest.raises(UserError, match="deepspeed=zero1 with precision=bf16 .* than deepspeed=zero2"):
        validate.check(compose("deepspeed=zero1", "precision=bf16"))


def test_bf16_is_refused_on_a_gpu_that_emulates_it(monkeypatch):
    cuda, settings = torch.device("cuda"), compose("precision=bf16")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(UserError, match="precision=bf16: this GPU has no bf16 arithmetic; use precision=fp32"):
        open_engine(Scorer(random_model(), "sdpa"), settings.optim, "bf16", settings.deepspeed, cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert has_bf16(cuda)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_parameters_are_rounded_from_masters_so_that_weights_cross_to_the_device_once(stored, monkeypatch):
    scorer, left = Scorer(random_model().to(stored), "sdpa"), []
    weights = {name: param.detach().clone() for name, param in scorer.named_parameters()}
    places = {name: param.data_ptr() for name, param in scorer.named_parameters()}

    def cast(module, device, dtype):
        left.extend(name for name, param in module.named_parameters() if param.data_ptr() == places[name])
        return hub.cast(module, device, dtype)

    monkeypatch.setattr(engine, "cast", cast)
    opened = engine.Plain(scorer, config.Optim(), "bf16", torch.device("cpu"))
    assert left == []  # nothing is left to move
    for name, weight in weights.items():
        assert torch.equal(opened.masters[name], weight.float())
        assert torch.equal(opened.params[name], weight.to(torch.bfloat16))
