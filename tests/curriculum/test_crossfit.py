"""Cross-fitted models, against steps that the test takes itself."""

from dataclasses import replace

import numpy as np
import pytest
from toys import prepare

from sdpo.curriculum import build, crossfit
from sdpo.curriculum.chunking import split_rows
from sdpo.train.step import take_step
from sdpo.train.step_key import StepSpec
from sdpo.variants.split import random

SETTINGS = {"repeats": 2, "beta": 0.2, "seed": 3}


@pytest.fixture(scope="module")
def made(toy, tmp_path_factory):
    overrides = ["split=all_at_once", "split.keep=0.5", "score=validation_loss", "score.repeats=2", "score.seed=3"]
    return prepare(toy, tmp_path_factory.mktemp("store"), *overrides, "score.beta=0.2", "optim.epochs=2")


@pytest.fixture(scope="module")
def margins(made):
    settings, inputs = made
    return crossfit.margins(inputs, settings, **SETTINGS)


def test_every_pair_is_scored_by_the_model_of_the_other_half(made, margins):
    settings, inputs = made
    # The second repeat of seed 3.
    trained, unseen = map(inputs.train.indices, random(split_rows(inputs.train), 3001, num_chunks=2))
    loss = {"name": "dpo", "beta": 0.2}
    training = replace(settings, loss=loss, reference={"name": "initial", "placebo": "none"}, seed=3)
    spec = StepSpec(1, training, inputs.initial, [inputs.initial], inputs.chunk(trained))
    step = take_step(spec, inputs.runner)
    assert step.model.reused  # it is an ordinary step of the store
    rows = inputs.train.take(unseen).rows
    policy, initial = (inputs.runner.logprobs(model, rows) for model in (step.model, inputs.initial))
    expected = (policy - initial)[:, 0] - (policy - initial)[:, 1]
    np.testing.assert_allclose(margins[unseen, 1], expected, atol=1e-4)
    assert np.isfinite(margins).all() and margins.shape == (len(inputs.train), 2)


def test_other_runs_find_the_models(made, margins, monkeypatch):
    settings, inputs = made
    monkeypatch.setattr("sdpo.train.step.TrainingLoop", lambda *_: pytest.fail("trained again"))
    other = replace(settings, seed=9, loss={"name": "hinge", "beta": 0.3}, reference={"name": "previous"})
    other = replace(other, split=settings.split | {"within": "score"})  # the order of the run's own steps
    again = crossfit.margins(inputs, other, **SETTINGS)
    assert np.array_equal(again, margins)


def test_selective_dpo_keeps_the_half_of_least_validation_loss(made, margins):
    settings, inputs = made
    (chunk,) = build.build(inputs, settings, inputs.initial).chunks
    loss = np.log1p(np.exp(-0.2 * margins)).mean(axis=1)
    assert set(chunk) == set(np.argsort(loss)[: len(chunk)]) and len(chunk) == -(-len(loss) // 2)
