"""Cross-fitted DPO models: how well a pair is learned from other pairs (Selective DPO, 2502.09650).

Shape suffixes: N pairs, R repeats.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sdpo.config import Config, Probe
from sdpo.train.setup import Inputs
from sdpo.train.step import take_step
from sdpo.variants import score as scores
from sdpo.variants import split as splits
from sdpo.variants.split import Row


def margins(inputs: Inputs, config: Config, rows: Sequence[Row], *, repeats: int, beta: float, seed: int) -> np.ndarray:
    """Margins [N, R] of every training pair under models that DPO trained from S on the half without its prompt.

    Each repeat halves the data anew. The models are ordinary steps with the run's optimiser settings, and so found
    in the store by every other run that asks for them.
    """
    training, halves = trainings(config, rows, repeats=repeats, beta=beta, seed=seed)
    position = {row.id: i for i, row in enumerate(inputs.train)}
    initial_N = scores.gamma(inputs.bench.logprobs(inputs.initial, inputs.train))
    margins_NR = np.empty((len(inputs.train), repeats))
    for repeat, trained, unseen in halves:
        step = take_step(inputs.bench, training, 1, inputs.initial, [inputs.initial], inputs.chunk(trained))
        where = [position[id] for id in unseen]
        logps = inputs.bench.logprobs(step.model, [inputs.train[i] for i in where])
        margins_NR[where, repeat] = scores.gamma(logps) - initial_N[where]
    return margins_NR


def trainings(
    config: Config, rows: Sequence[Row], *, repeats: int, beta: float, seed: int
) -> tuple[Config, list[tuple[int, list[str], list[str]]]]:
    """How each model is trained, and for each its repeat and the ids of its own half and of the other."""
    loss = {"name": "dpo", "beta": beta, "label_smoothing": 0.0}
    reference = {"name": "initial", "placebo": "none"}
    optim = replace(config.optim, moments="reset", schedule_over="step")  # the run's steps go on, these do not
    halves = []
    for repeat in range(repeats):
        one, other = splits.random(rows, 1000 * seed + repeat, num_chunks=2)
        halves += [(repeat, one, other), (repeat, other, one)]
    training = replace(config, loss=loss, reference=reference, optim=optim, probe=Probe(), seed=seed)
    return training, halves
