"""Rotary frequencies that depend on the length of the sequence: each sequence has those of its own length."""

import numpy as np
import pytest
import torch
from conftest import random_model
from test_logprobs import gradients, louder, packed, row

from sdpo.model.logprobs import Scorer, naive_logprobs

LIMIT = 24
HALF = 4  # as many frequencies as half a head has dimensions
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * HALF,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": LIMIT,
}
MODELS = {
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": LIMIT,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    "longrope": ("phi3", {"original_max_position_embeddings": LIMIT, "rope_parameters": LONG}),
    "mscale": (
        "phimoe",
        {
            "num_local_experts": 4,
            "rope_parameters": LONG | {"factor": 4.0, "short_mscale": 1.2, "long_mscale": 0.8},
        },
    ),
}
# Prompt, chosen, rejected: far below the limit, at it, above it in one response, in one token more, and in both.
LENGTHS = [(5, 4, 6), (18, 6, 5), (18, 7, 1), (20, 30, 2), (9, 16, 15), (40, 3, 25), (30, 1, 1)]


def model_of(name):
    architecture, settings = MODELS[name]
    return louder(random_model(architecture, **settings))


def alone(name, rows):
    """The log-probs of each sequence from a model that has seen no other one."""

    def of(pair, response):  # as the chosen response, which naive_logprobs computes first
        return naive_logprobs(model_of(name), pair._replace(chosen=response)).chosen

    return torch.stack([torch.stack([of(pair, pair.chosen), of(pair, pair.rejected)]) for pair in rows])


@pytest.mark.filterwarnings("ignore:.*RoPE", "ignore:.*rope")
@pytest.mark.parametrize("attention", ["auto", "plain"])
@pytest.mark.parametrize("name", MODELS)
def test_a_sequence_has_the_frequencies_of_its_own_length(name, attention):
    rows = [row(str(i), *three, seed=i) for i, three in enumerate(LENGTHS)]
    scorer = Scorer(model_of(name), attention)
    with torch.no_grad():
        want = alone(name, rows)
        got = packed(scorer, rows)
        one_by_one = torch.cat([packed(scorer, [pair]) for pair in rows[::-1]]).flip(0)
        short = packed(scorer, rows[:2])
        naive = torch.stack([torch.stack(naive_logprobs(scorer.model, pair)) for pair in rows])
    for numbers in (got, one_by_one, naive):
        torch.testing.assert_close(numbers, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(short, want[:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
@pytest.mark.filterwarnings("ignore:.*RoPE", "ignore:.*rope")
def test_gradients_above_the_limit_are_those_of_the_naive_pass(name):
    rows, model = [row("a", 18, 7, 12), row("b", 3, 4, 2)], model_of(name)
    scorer = Scorer(model)
    got = gradients(model, packed(scorer, rows))
    want = gradients(model, torch.stack([torch.stack(naive_logprobs(model, pair)) for pair in rows]))
    for key in want:
        np.testing.assert_allclose(got[key], want[key], rtol=1e-4, atol=1e-4)
