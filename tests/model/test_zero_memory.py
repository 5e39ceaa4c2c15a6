"""Engines on DeepSpeed start from the stored weights, and give all their memory back when they are closed."""

import gc

import forked
import numpy as np
import pytest
import torch
from conftest import random_model

from sdpo import config
from sdpo.model import engine, hub, parameters
from sdpo.model.logprobs import Scorer, score
from sdpo.model.packing import pack
from sdpo.types import TokenPair

CPU = torch.device("cpu")
TOKENS = np.arange(3, 43, dtype=np.int32)
PAIR = TokenPair("a", TOKENS[:10], TOKENS[10:25], TOKENS[25:])


def live():
    """The bytes of all tensors that are alive."""
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def four_steps():
    """At every stage, open, train and close four engines and four that only score: the bytes that stay after each."""
    found = []
    for stage in (1, 2, 3):
        left, settings = [], config.Deepspeed(stage)
        for _ in range(4):
            model = random_model(hidden_size=512, intermediate_size=512, vocab_size=1000)
            size = 4 * sum(param.numel() for param in model.parameters())
            scorer = Scorer(model, "sdpa")
            opened = engine.open_engine(scorer, config.Optim(), "fp32", settings, CPU)
            for _ in range(2):
                policy = opened.module(pack([PAIR]))
                opened.backward(policy.rejected.sum() - policy.chosen.sum(), last=True)
                opened.update(1e-4)
                score(opened.module, [PAIR], 8192)
            opened.close()
            del policy, model, scorer
            frozen = Scorer(random_model().requires_grad_(False))
            opened = engine.open_engine(frozen, config.Optim(), "fp32", settings, CPU)
            score(opened.module, [PAIR], 8192)
            opened.close()
            del frozen
            left.append(live())  # `opened` still names the closed engine
        found.append({"stage": stage, "size": size, "left": left})
    return found


def masters(folder):
    """Whether the masters of an engine are the stored weights, by stage, stored type and precision."""
    found = []
    engine.has_bf16 = lambda device: True  # nothing is computed here
    for stored in ("float32", "bfloat16"):
        random_model(seed=3).to(getattr(torch, stored)).save_pretrained(folder / stored)
        expected = {f"model.{name}": param for name, param in hub.load(folder / stored).named_parameters()}
        for stage, precision in ((2, "bf16"), (3, "bf16"), (2, "fp32"), (3, "fp32")):
            scorer = Scorer(hub.load(folder / stored, as_stored=True), "sdpa")
            opened = engine.open_engine(scorer, config.Optim(), precision, config.Deepspeed(stage), CPU)
            weights = opened.weights()
            same = weights.keys() == expected.keys() and all(map(torch.equal, weights.values(), expected.values()))
            found.append({"stage": stage, "stored": stored, "precision": precision, "same": same})
            opened.close()
    return found


def growths():
    """By stage, the bytes that a trial adds, of the fp32 weights, and of gradients that stay after a micro-batch."""
    found = []
    for stage in (1, 2):
        opened = engine.open_engine(Scorer(random_model()), config.Optim(), "fp32", config.Deepspeed(stage), CPU)
        added = sum(tensor.nbytes for tensor in parameters.growth(opened.optimizer, opened.sums))
        size, bucket = 4 * sum(opened.numels), 4 * opened.zero.reduce_bucket_size
        policy = opened.module(pack([PAIR]))
        opened.backward(policy.rejected.sum() - policy.chosen.sum(), last=False)
        whole = sum(param.grad.nbytes for param in opened.scorer.parameters() if param.grad is not None)
        found.append({"added": added - bucket, "size": size, "whole": whole})
        opened.close()
    return found


@pytest.mark.slow
def test_a_trial_adds_sums_and_moments_and_at_stage_1_whole_gradients():
    (found,) = forked.on_ranks(1, growths)
    for each, copies in zip(found, (4, 3), strict=True):
        assert each["added"] == pytest.approx(copies * each["size"], rel=0.01), each
        assert each["whole"] == pytest.approx((copies - 3) * each["size"], rel=0.01), each


@pytest.mark.slow
def test_masters_are_the_stored_weights_bit_for_bit(tmp_path):
    (found,) = forked.on_ranks(1, masters, tmp_path)
    assert len(found) == 8 and [each for each in found if not each["same"]] == []


@pytest.mark.slow
def test_live_memory_is_flat_over_four_steps_at_every_stage():
    (found,) = forked.on_ranks(1, four_steps)
    assert [each["stage"] for each in found] == [1, 2, 3]
    for each in found:
        growth = max(each["left"]) - each["left"][0]
        assert growth < 0.01 * each["size"], each
        assert each["left"][-1] < 0.1 * each["size"], each
