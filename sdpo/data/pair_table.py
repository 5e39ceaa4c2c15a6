"""The pairs of one side, training or held out, with their tokens: index i means the same pair in every column.

Shape suffixes: N pairs; columns are the chosen and the rejected response.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from sdpo.data.preferences import Pair, prompt_key
from sdpo.data.tokenize import response_lengths
from sdpo.types import TokenPair


@dataclass(frozen=True)
class PairTable:
    """Inside a run a pair is an index into this table. Files and splits name pairs by their ids."""

    pairs: list[Pair]
    rows: list[TokenPair]

    @classmethod
    def join(cls, pairs: Iterable[Pair], rows: dict[str, TokenPair]) -> Self:
        """The pairs that have token rows, in the order of the pairs."""
        kept = [pair for pair in pairs if pair.id in rows]
        return cls(kept, [rows[pair.id] for pair in kept])

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Iterable[int]) -> Self:
        """The table of some of the pairs, in the order of the indices."""
        return type(self)([self.pairs[i] for i in indices], [self.rows[i] for i in indices])

    def indices(self, ids: Iterable[str]) -> np.ndarray:
        """The indices of the pairs with these ids."""
        return np.array([self._position[id] for id in ids], dtype=int)

    @cached_property
    def ids(self) -> list[str]:
        return [row.id for row in self.rows]

    @cached_property
    def sources(self) -> np.ndarray:
        """The source of each pair [N], as text."""
        return np.array([pair.source for pair in self.pairs], dtype=object)

    @cached_property
    def prompt_keys(self) -> list[str]:
        """A hash of each prompt [N]: pairs have equal keys exactly if they have the same prompt."""
        return [prompt_key(pair.prompt) for pair in self.pairs]

    @cached_property
    def ratings_N2(self) -> np.ndarray:
        """The ratings of chosen and rejected (fp32); nan if a pair has none."""
        ratings = [(pair.chosen_rating, pair.rejected_rating) for pair in self.pairs]
        return np.array(ratings, dtype=np.float32).reshape(-1, 2)

    @cached_property
    def lengths_N2(self) -> np.ndarray:
        """The number of tokens of both responses."""
        return response_lengths(self.rows)

    @cached_property
    def _position(self) -> dict[str, int]:
        return {id: i for i, id in enumerate(self.ids)}
