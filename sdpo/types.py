"""Types of data that several packages exchange. Shape suffixes: B pairs of a batch, N pairs of a chunk, T tokens."""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor


class ChosenRejected(NamedTuple):
    """One quantity of the chosen and of the rejected responses, each [B]."""

    chosen: Tensor
    rejected: Tensor


class TokenPair(NamedTuple):
    """The token ids of a pair, each int32 [T]. A response ends with its stop token unless it was truncated."""

    id: str
    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray  # empty in a demonstration
    weights: Any = None  # of the tokens of chosen and rejected in sums of log-probs, a pair of arrays; None: all 1

    @property
    def ids(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Prompt, chosen and rejected."""
        return self.prompt, self.chosen, self.rejected


class Chunk(NamedTuple):
    """The pairs of one step and their ratings [N, 2], chosen and rejected."""

    rows: list[TokenPair]
    ratings_N2: np.ndarray
    probes: Sequence[TokenPair] = ()  # pairs whose log-probs are measured while the step trains
    probed: Sequence[int] = ()  # positions of some rows whose gradient weights are measured when the step is done
    made_from: Path | None = None  # the file with the judged answers that the pairs were made from; None: given pairs


class Scored(NamedTuple):
    """The log-probs of N held-out pairs under a model, its step's reference and S; None where S itself has none.

    `lengths` are numbers of tokens. All are [N, 2].
    """

    policy: np.ndarray
    reference: np.ndarray | None
    initial: np.ndarray | None
    lengths: np.ndarray


class SplitRow(NamedTuple):
    """What a split may read of a pair: no text and no labels."""

    id: str
    source: str
    prompt: Hashable  # pairs with equal values share a chunk
    tokens: int  # as many as pass through the network in training


Chunks = list[list[str]]  # what a split returns: the ids of each step's pairs


class Window(NamedTuple):
    """Consecutive updates with one frozen reference, and the reference's weights as {handle: coefficient}.

    If there is a `bound`, the window ends early, whenever the policy is further than that from the reference (the
    `kl_proxy` of an update's pairs, nats per token). The policy is then the reference of the next one.
    """

    num_updates: int
    weights: dict[str, float]
    bound: float | None = None
