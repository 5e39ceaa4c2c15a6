"""A checkpoint of one number of ranks, from which another number goes on: the same masters, moments and next update."""

import forked
import numpy as np
import pytest
import torch
from conftest import random_model

from sdpo import config, distributed
from sdpo.errors import UserError
from sdpo.model.checkpoints import redivision
from sdpo.model.checkpoints.checkpoint import Checkpoint, Saved
from sdpo.model.engine import open_engine
from sdpo.model.logprobs import Scorer
from sdpo.model.packing import pack
from sdpo.model.zero import Zero
from sdpo.store.artifacts import Store
from sdpo.types import TokenPair

TOKENS = np.arange(3, 33, dtype=np.int32).reshape(3, 10)


def go_on(stage, folder, before):
    """Go on from the checkpoint after `before` updates, or begin; save one more. Weights before the last update, after.

    Every rank has the same pair, and its share of the sum, so that all numbers of ranks have the same gradients.
    """
    scorer, settings = Scorer(random_model(seed=before), "sdpa"), config.Deepspeed(stage)
    engine = open_engine(scorer, config.Optim(), "fp32", settings, torch.device("cpu"))
    checkpoint = Checkpoint(Store(folder), "k" * 64, "step", 0)
    if before:
        assert checkpoint.restore(engine)
    loaded = engine.weights(everywhere=True)
    policy = engine.module(pack([TokenPair("a", *TOKENS)]))
    engine.backward((policy.rejected - policy.chosen).sum() / distributed.world_size(), last=True)
    engine.update(1e-3 * 2**before)
    checkpoint.save(engine, Saved({"any": torch.zeros(1)}, {"entries": [None] * (before + 1)}))
    checkpoint.join()
    return [{name: p.numpy() for name, p in one.items()} for one in (loaded, engine.weights(everywhere=True))]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_three_ranks_and_one_go_on_from_what_two_have_saved(stage, tmp_path):
    """Neither 32 nor the number of all weights is divisible by three, so shares end in zeros that are not weights."""
    (_, first), *_ = forked.on_ranks(2, go_on, stage, tmp_path / "changing", 0)
    for before, ranks in ((1, 3), (2, 1), (3, 2)):
        found = forked.on_ranks(ranks, go_on, stage, tmp_path / "changing", before)
        for loaded, _ in found:
            assert all(np.array_equal(loaded[name], first[name]) for name in first)
        first = found[0][1]
    for before in range(4):
        ((_, expected),) = forked.on_ranks(1, go_on, stage, tmp_path / "one", before)
    for name, weight in expected.items():  # an update without its moments would be off by about its rate, 8e-3
        np.testing.assert_allclose(first[name], weight, atol=1e-5, rtol=0)


class Eightfold(Zero):
    """An engine whose moments are 8-bit numbers."""

    def __init__(self):
        self.states = "8bit"


def test_8_bit_moments_are_not_divided_anew(tmp_path):
    with pytest.raises(UserError, match="saved by 2 ranks; 8-bit moments.*go on with as many ranks"):
        redivision.read([tmp_path / "moments-0.safetensors", tmp_path / "moments-1.safetensors"], Eightfold())
