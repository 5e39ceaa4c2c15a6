"""Cuts pairs into micro-batches, and lays each one out as a single padding-free token stream.

The stream of a pair is prompt, chosen, rejected: the prompt appears once. The last token of a response predicts
nothing, so it is not in the stream. A sequence is a prompt with one response: the tokens that attention sees, and what
a plain forward pass would run on.

Shapes: B pairs, T tokens of the stream, S sequences, K tokens of all sequences, R response tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdpo.types import TokenPair

# On a CPU, a matrix product with at least four rows gives each row the same bits whatever the other rows are.
MIN_ROWS = 4


class Pack(NamedTuple):
    """One micro-batch as a flat stream, with the indices that attention and the head need."""

    tokens_T: Tensor
    positions_T: Tensor  # both responses continue from the end of the prompt
    keys_K: Tensor  # stream index of each sequence's tokens, one sequence after another
    lengths_S: list[int]  # number of tokens of each sequence
    own_S: list[int]  # how many of them, always the last ones, belong to this sequence alone
    rows_R: Tensor  # stream index of the token before each response token
    targets_R: Tensor  # the response tokens
    branches_R: Tensor  # the sum that each response token belongs to: 2i for chosen, 2i + 1 for rejected of pair i
    weights_R: Tensor | None  # of the response tokens in the sums; None: all 1
    rows: Sequence[TokenPair]  # without the closing pair, whose branches come last

    @property
    def num_pairs(self) -> int:
        return len(self.rows)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest prompt with its whole response."""
        return max((row.longest for row in self.rows), default=0)

    def apart(self) -> list["Pack"]:
        """One pack per sequence, chosen and rejected in turn, for models that read a sequence's length off its pack.

        The stream lacks the last token of a response, so the last closing token takes its position.
        """
        packs, none = [], np.zeros(0, np.int32)
        for row in self.rows:
            for branch, response in enumerate((row.chosen, row.rejected)):
                weights = row.weights and (row.weights[branch], none)
                alone = pack([TokenPair(row.id, row.prompt, response, none, weights)])
                alone.positions_T[-1] = max(int(alone.positions_T[-1]), len(row.prompt) + len(response) - 1)
                packs.append(alone.to(self.tokens_T.device))
        return packs

    def to(self, device: torch.device | str) -> "Pack":
        """The same pack with its tensors on a device."""
        fields = self._asdict().items()
        moved: dict[str, Any] = {name: x.to(device, non_blocking=True) for name, x in fields if isinstance(x, Tensor)}
        return self._replace(**moved)


def tokens_of(row: TokenPair) -> int:
    """Number of tokens of a pair that pass through the network."""
    return len(row.prompt) + len(row.chosen[:-1]) + len(row.rejected[:-1])


def pack(rows: Sequence[TokenPair]) -> Pack:
    """Lay pairs out as one stream. An empty list gives a valid pack of zero pairs.

    The two sequences of a pair share one copy of the prompt. An empty rejected response (a demonstration) adds no
    tokens.
    """
    streams, positions, keys, lengths, own, before, targets, branches = ([] for _ in range(8))
    end = 0
    for i, row in enumerate([*rows, _closing_pair(rows)]):
        prompt = np.arange(end, end + len(row.prompt))
        end += len(prompt)
        streams.append(row.prompt)
        positions.append(np.arange(len(prompt)))
        for branch, response in enumerate((row.chosen, row.rejected)):
            inputs = response[:-1]
            indices = np.arange(end, end + len(inputs))
            end += len(inputs)
            streams.append(inputs)
            positions.append(np.arange(len(prompt), len(prompt) + len(inputs)))
            if len(response):
                before += [prompt[-1:], indices]
                targets.append(response)
                branches.append(np.full(len(response), 2 * i + branch))
            if branch == 0 or len(inputs):
                keys += [prompt, indices]
                lengths.append(len(prompt) + len(inputs))
                own.append(len(inputs) + (len(prompt) if branch == 0 else 0))
    return Pack(
        tokens_T=_tensor(streams),
        positions_T=_tensor(positions),
        keys_K=_tensor(keys),
        lengths_S=lengths,
        own_S=own,
        rows_R=_tensor(before),
        targets_R=_tensor(targets),
        branches_R=_tensor(branches),
        weights_R=_weights(rows, sum(map(len, targets))),
        rows=rows,
    )


def _weights(rows: Sequence[TokenPair], num_targets: int) -> Tensor | None:
    """The weights [R] of the response tokens of a pack; None if no row has any."""
    if not any(row.weights for row in rows):
        return None
    given = [weights for row in rows for weights in row.weights or map(np.ones_like, (row.chosen, row.rejected))]
    weights_R = np.ones(num_targets, dtype=np.float32)  # the last ones are the closing pair's
    weights_R[: sum(map(len, given))] = np.concatenate(given)
    return torch.from_numpy(weights_R)


def _closing_pair(rows: Sequence[TokenPair]) -> TokenPair:
    """A pair of dummy tokens that ends every stream, so that log-probs do not depend on the other pairs of the pack.

    Vectorised functions round the last few elements of a tensor in their own way; here these are the dummy's. It has
    one token, or as many as make the stream and its responses MIN_ROWS long. Nothing reads its log-probs.
    """
    num_responses = sum(len(row.chosen) + len(row.rejected) for row in rows)
    missing = MIN_ROWS - min(num_responses, sum(map(tokens_of, rows)))
    return TokenPair("", *(np.zeros(n, np.int32) for n in (1, max(1, missing), 0)))


def _tensor(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def scoring_packs(rows: Sequence[TokenPair], tokens_per_pack: int) -> list[list[int]]:
    """Packs of a pass that only scores, as lists of row indices: sorted by length, then id, and filled in turn.

    The packs depend on the rows alone, never on a seed or on the order of training.
    """
    packs: list[list[int]] = []
    tokens = tokens_per_pack
    for i in sorted(range(len(rows)), key=lambda i: (tokens_of(rows[i]), rows[i].id)):
        if tokens + tokens_of(rows[i]) > tokens_per_pack:
            packs.append([])
            tokens = 0
        packs[-1].append(i)
        tokens += tokens_of(rows[i])
    return packs


def micro_batches(rows: Sequence[TokenPair], tokens_per_pack: int, ranks: int = 1) -> list[list[list[int]]]:
    """Cut an update into micro-batches. Returns, per rank, equally many lists of row indices.

    A micro-batch holds at most `tokens_per_pack` tokens; a longer pair is alone in one. All take about the same work.
    If there are fewer pairs than micro-batches, some are empty.
    """
    tokens, work = [tokens_of(row) for row in rows], [_work(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (-work[i], rows[i].id))
    per_rank = max(1, -(-sum(tokens) // (tokens_per_pack * ranks)))
    while (bins := _fill(order, tokens, work, tokens_per_pack, per_rank * ranks)) is None:
        per_rank += 1
    # Deal the bins to the ranks forth and back, so that no rank always gets the heaviest one.
    turns = [bins[i : i + ranks] for i in range(0, len(bins), ranks)]
    return [[turn[rank if k % 2 == 0 else -1 - rank] for k, turn in enumerate(turns)] for rank in range(ranks)]


def _fill(
    order: list[int], tokens: list[int], work: list[float], tokens_per_pack: int, num_bins: int
) -> list[list[int]] | None:
    """Put each pair, heaviest first, into the lightest bin that it fits in; None if a pair fits in no bin."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    used, load = [0] * num_bins, [0.0] * num_bins
    for i in order:
        fitting = [b for b in range(num_bins) if not bins[b] or used[b] + tokens[i] <= tokens_per_pack]
        if not fitting:
            return None
        lightest = min(fitting, key=lambda b: load[b])
        bins[lightest].append(i)
        used[lightest] += tokens[i]
        load[lightest] += work[i]
    return [bins[b] for b in sorted(range(num_bins), key=lambda b: -load[b])]


def _work(row: TokenPair) -> float:
    """Relative cost of a pair: its tokens for the linear layers, plus its visible token pairs for attention.

    In a 7B model, a prefix of 1k tokens makes a token cost about a quarter more.
    """
    P, C, R = len(row.prompt), len(row.chosen), len(row.rejected)
    return tokens_of(row) + ((P + C) ** 2 + (P + R) ** 2 - P**2) / 8192
