"""Data that several rooms pass on."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor


class ChosenRejected(NamedTuple):
    """The same quantity for the chosen and for the rejected response, each [B]."""

    chosen: Tensor
    rejected: Tensor


class TokenPair(NamedTuple):
    """Token ids, int32 [T]. A response ends in its one stop token, unless it was truncated."""

    id: str
    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray  # of length 0 in a demonstration


class Chunk(NamedTuple):
    """The pairs of one step, and what a loss may read of them; columns are chosen, rejected."""

    rows: list[TokenPair]
    ratings_N2: np.ndarray
    probes: Sequence[TokenPair] = ()  # the pairs that are followed while it trains


class SplitRow(NamedTuple):
    """What a split may know of a pair: no text and no labels."""

    id: str
    source: str
    prompt: Hashable  # pairs with equal keys share a chunk
    tokens: int  # that pass through the network in training


Chunks = list[list[str]]  # ids of each step's pairs, as a split gives them


class Window(NamedTuple):
    """A run of updates during which the reference is frozen, and the weights it is frozen at."""

    num_updates: int
    weights: dict[str, float]
