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
    weights: Any = None  # of the chosen and the rejected tokens in the summed log-probs, two arrays; None: all 1

    @property
    def ids(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Prompt, chosen and rejected."""
        return self.prompt, self.chosen, self.rejected

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longer response."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


class Chunk(NamedTuple):
    """The pairs of one step and their ratings [N, 2], chosen and rejected."""

    rows: list[TokenPair]
    ratings_N2: np.ndarray
    probes: Sequence[TokenPair] = ()  # pairs whose log-probs are measured while the step trains
    probed: Sequence[int] = ()  # positions of some rows whose gradient weights are measured when the step is done
    made_from: Path | None = None  # the file with the judged answers that the pairs were made from; None: given pairs


class Scored(NamedTuple):
    """Summed log-probs of N held-out pairs under the model, its step's reference and S, and numbers of tokens: [N, 2].

    `reference` is None for S and for losses without a reference; `initial` is None for S.
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
    tokens: int  # that pass through the network in training


Chunks = list[list[str]]  # what a split returns: the ids of each step's pairs


class Window(NamedTuple):
    """Consecutive updates with one frozen reference, and the reference's weights as {handle: coefficient}.

    With a `bound`, the window ends after the first update whose `kl_proxy` (nats per token) exceeds it. The policy of
    that time is the reference of the next window.
    """

    num_updates: int
    weights: dict[str, float]
    bound: float | None = None
