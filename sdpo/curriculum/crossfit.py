"""Cross-fitted DPO models: how well a pair is predicted by models trained on other pairs (Selective DPO, 2502.09650).

Shape suffixes: N pairs, R repeats.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from sdpo.config import Config, Probe
from sdpo.curriculum.chunking import split_rows
from sdpo.train.setup import Inputs
from sdpo.train.step import name_step, take_step
from sdpo.train.step_key import StepSpec
from sdpo.variants import score as scores
from sdpo.variants import split as splits


class Half(NamedTuple):
    """One cross-fitted model: its training step, and the pairs that it scores."""

    repeat: int
    spec: StepSpec
    unseen: np.ndarray  # the training pairs that it is not trained on, as indices


def margins(inputs: Inputs, config: Config, *, repeats: int, beta: float, seed: int) -> np.ndarray:
    """Margins [N, R] of every training pair, each under a model that DPO trained from S on the half without its prompt.

    Each repeat halves the data in another way. The models are ordinary steps with the run's optimiser settings, so
    other runs with the same settings find them in the store. Their training is not logged.
    """
    initial_N = scores.gamma(inputs.runner.logprobs(inputs.initial, inputs.train.rows))
    margins_NR = np.empty((len(inputs.train), repeats))
    for half in halves(inputs, config, repeats=repeats, beta=beta, seed=seed):
        model = take_step(half.spec, inputs.runner).model
        logps_N2 = inputs.runner.logprobs(model, inputs.train.take(half.unseen).rows)
        margins_NR[half.unseen, half.repeat] = scores.gamma(logps_N2) - initial_N[half.unseen]
    return margins_NR


def has_margins(inputs: Inputs, config: Config, **settings: Any) -> bool:
    """Whether the store has all models and log-probs that `margins` reads."""
    runner = inputs.runner
    for half in halves(inputs, config, **settings):
        key = name_step(half.spec, runner).key
        model = half.spec.start._replace(key=key, folder=runner.store.folder("step", key))
        if not (runner.store.has("step", key) and runner.has_logprobs(model, inputs.train.take(half.unseen).rows)):
            return False
    return runner.has_logprobs(inputs.initial, inputs.train.rows)


def halves(inputs: Inputs, config: Config, *, repeats: int, beta: float, seed: int) -> Iterator[Half]:
    """The models in training order, two per repeat."""
    training = replace(
        config,
        split={},
        loss={"name": "dpo", "beta": beta, "label_smoothing": 0.0},
        reference={"name": "initial", "placebo": "none"},
        optim=replace(config.optim, moments="reset", schedule_over="step"),  # as if it were the only step
        probe=Probe(),
        seed=seed,
    )
    rows = split_rows(inputs.train)
    for repeat in range(repeats):
        one, other = map(inputs.train.indices, splits.random(rows, 1000 * seed + repeat, num_chunks=2))
        for trained, unseen in ((one, other), (other, one)):
            spec = StepSpec(1, training, inputs.initial, [inputs.initial], inputs.chunk(trained))
            yield Half(repeat, spec, unseen)
