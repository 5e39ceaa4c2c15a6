"""Which pairs each update reads, and the learning rate."""

import math
from typing import NamedTuple

import numpy as np

from sdpo.config import Optim


def updates(num_pairs: int, optim: Optim, seed: int) -> list[np.ndarray]:
    """Which pairs each update reads: a fresh permutation every epoch, which depends on the seed alone."""
    plan = []
    for epoch in range(optim.epochs):
        order = np.random.default_rng([seed, epoch]).permutation(num_pairs)
        plan += np.split(order, range(optim.pairs_per_update, num_pairs, optim.pairs_per_update))
    return plan


class Span(NamedTuple):
    """What one schedule spans: the updates before this step's, and all of them."""

    before: int
    total: int


def learning_rate(update: int, num_updates: int, optim: Optim) -> float:
    """Linear warm-up, then the schedule down to 0 after `num_updates` (`update` counts from 0)."""
    warmup = math.ceil(optim.warmup * num_updates)
    if update < warmup:
        return optim.lr * (update + 1) / warmup
    left = (num_updates - update) / max(1, num_updates - warmup)
    shapes = {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}
    return optim.lr * shapes[optim.schedule]
