"""Cross-fitted models: who scores what, against steps taken by hand."""

from dataclasses import replace

import numpy as np
import pytest
from toys import prepare

from sdpo.curriculum import build, crossfit
from sdpo.curriculum.score_inputs import rows_of
from sdpo.train.step import take_step
from sdpo.variants.split import random

SETTINGS = {"repeats": 2, "beta": 0.2, "seed": 3}


@pytest.fixture(scope="module")
def made(toy, tmp_path_factory):
    overrides = ["split=all_at_once", "split.keep=0.5", "score=validation_loss", "score.repeats=2", "score.seed=3"]
    return prepare(toy, tmp_path_factory.mktemp("store"), *overrides, "score.beta=0.2", "optim.epochs=2")


@pytest.fixture(scope="module")
def margins(made):
    settings, inputs = made
    return crossfit.margins(inputs, settings, rows_of(inputs), **SETTINGS)


def test_every_pair_is_judged_by_the_model_of_the_other_half(made, margins):
    settings, inputs = made
    halves = random(rows_of(inputs), 3001, num_chunks=2)  # the second repeat of seed 3
    loss = {"name": "dpo", "beta": 0.2}
    training = replace(settings, loss=loss, reference={"name": "initial", "placebo": "none"}, seed=3)
    step = take_step(inputs.bench, training, 1, inputs.initial, [inputs.initial], inputs.chunk(halves[0]))
    assert step.model.reused  # it is an ordinary step of the store
    place = {row.id: i for i, row in enumerate(inputs.train)}
    where = [place[id] for id in halves[1]]
    rows = [inputs.train[i] for i in where]
    policy, initial = (inputs.bench.logprobs(model, rows) for model in (step.model, inputs.initial))
    expected = (policy - initial)[:, 0] - (policy - initial)[:, 1]
    np.testing.assert_allclose(margins[where, 1], expected, atol=1e-4)
    assert np.isfinite(margins).all() and margins.shape == (len(inputs.train), 2)


def test_other_runs_find_the_models(made, margins, monkeypatch):
    settings, inputs = made
    monkeypatch.setattr("sdpo.train.step.Fit", lambda *_: pytest.fail("trained again"))
    other = replace(settings, seed=9, loss={"name": "hinge", "beta": 0.3}, reference={"name": "previous"})
    again = crossfit.margins(inputs, other, rows_of(inputs), **SETTINGS)
    assert np.array_equal(again, margins)


def test_selective_dpo_keeps_the_half_of_least_validation_loss(made, margins):
    settings, inputs = made
    (chunk,) = build.in_order(inputs, settings, [inputs.initial])
    loss = np.log1p(np.exp(-0.2 * margins)).mean(axis=1)
    ids = np.array([row.id for row in inputs.train])
    assert set(chunk) == set(ids[np.argsort(loss)[: len(chunk)]]) and len(chunk) == -(-len(ids) // 2)
