"""The pairs that each update reads, and the learning rate."""

import math
from typing import NamedTuple

import numpy as np

from sdpo.config import Optim


def updates(num_pairs: int, optim: Optim, seed: int, in_order: bool = False) -> list[np.ndarray]:
    """The pairs of each update, as positions in the chunk.

    Every epoch has a new permutation, derived from the seed, unless the chunk is trained `in_order`.
    """
    plan = []
    for epoch in range(optim.epochs):
        order = np.arange(num_pairs) if in_order else np.random.default_rng([seed, epoch]).permutation(num_pairs)
        plan += np.split(order, range(optim.pairs_per_update, num_pairs, optim.pairs_per_update))
    return plan


class Span(NamedTuple):
    """The updates that one schedule spans: how many there are, and how many of them come before this step."""

    before: int
    total: int


def learning_rate(update: int, num_updates: int, optim: Optim) -> float:
    """The rate of an update (counted from 0): a linear warm-up, then the schedule, which reaches 0 after the last."""
    warmup = math.ceil(optim.warmup * num_updates)
    if update < warmup:
        return optim.lr * (update + 1) / warmup
    left = (num_updates - update) / max(1, num_updates - warmup)
    shapes = {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}
    return optim.lr * shapes[optim.schedule]
