"""Pairs -> micro-batches -> one padding-free token stream each, in which a prompt stands once.

The stream of a pair is prompt, chosen, rejected; the last token of a response predicts nothing and stays out.
A sequence is a prompt with one response: what attention sees, and what a plain forward pass would run.

Shapes: B pairs, T tokens of the stream, S sequences, K tokens of all sequences, R response tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdpo.types import TokenPair

# On CPU a matrix product gives a row the same bits whatever the other rows are, but only from four rows on.
MIN_ROWS = 4


class Pack(NamedTuple):
    """One micro-batch as a flat stream, with what attention and the head need to know about it."""

    tokens_T: Tensor
    positions_T: Tensor  # those of the rejected response restart after the prompt
    keys_K: Tensor  # where each sequence's tokens stand in the stream, one sequence after another
    lengths_S: list[int]  # tokens of each sequence ...
    own_S: list[int]  # ... and how many of them, the last ones, stand in the stream for this sequence alone
    rows_R: Tensor  # where the token before each response token stands in the stream
    targets_R: Tensor  # the response tokens
    branches_R: Tensor  # which sum a response token belongs to: 2i for chosen, 2i + 1 for rejected of pair i
    num_pairs: int  # what closes the stream counts as one pair more

    def to(self, device: torch.device | str) -> "Pack":
        """The same pack with its tensors on a device."""
        return Pack(*(x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in self))


def tokens_of(row: TokenPair) -> int:
    """Tokens of a pair that pass through the network."""
    return len(row.prompt) + len(row.chosen[:-1]) + len(row.rejected[:-1])


def pack(rows: Sequence[TokenPair]) -> Pack:
    """Lay pairs out as one stream; no pairs at all still give one that runs, and log-probs of nobody.

    A prompt is always shared: attention sees the same sequences either way, everything else fewer tokens. An empty
    rejected response (a demonstration) adds nothing.
    """
    streams, positions, keys, lengths, own, before, targets, branches = ([] for _ in range(8))
    end = 0
    for i, row in enumerate([*rows, _closing(rows)]):
        prompt = np.arange(end, end + len(row.prompt))
        end += len(prompt)
        streams.append(row.prompt)
        positions.append(np.arange(len(prompt)))
        for branch, response in enumerate((row.chosen, row.rejected)):
            inputs = response[:-1]
            where = np.arange(end, end + len(inputs))
            end += len(inputs)
            streams.append(inputs)
            positions.append(np.arange(len(prompt), len(prompt) + len(inputs)))
            if len(response):
                before += [prompt[-1:], where]
                targets.append(response)
                branches.append(np.full(len(response), 2 * i + branch))
            if branch == 0 or len(inputs):
                keys += [prompt, where]
                lengths.append(len(prompt) + len(inputs))
                own.append(len(inputs) + (len(prompt) if branch == 0 else 0))
    return Pack(
        *map(_tensor, (streams, positions, keys)),
        lengths,
        own,
        *map(_tensor, (before, targets, branches)),
        len(rows),
    )


def _closing(rows: Sequence[TokenPair]) -> TokenPair:
    """What ends every stream, read by nobody, so that a pair's log-probs never depend on its company: one token,
    because vectorised functions round the last few elements of a tensor in their own way, or as many as make the
    stream and its responses MIN_ROWS long."""
    num_responses = sum(len(row.chosen) + len(row.rejected) for row in rows)
    missing = MIN_ROWS - min(num_responses, sum(map(tokens_of, rows)))
    return TokenPair("", *(np.zeros(n, np.int32) for n in (1, max(1, missing), 0)))


def _tensor(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def in_order(rows: Sequence[TokenPair], tokens_per_pack: int) -> list[list[int]]:
    """Packs of a reference pass, as indices of rows: by length, then id, cut greedily by the token budget.

    The order depends on the rows alone, never on a seed or on the order of training.
    """
    packs, tokens = [], tokens_per_pack
    for i in sorted(range(len(rows)), key=lambda i: (tokens_of(rows[i]), rows[i].id)):
        if tokens + tokens_of(rows[i]) > tokens_per_pack:
            packs.append([])
            tokens = 0
        packs[-1].append(i)
        tokens += tokens_of(rows[i])
    return packs


def micro_batches(rows: Sequence[TokenPair], tokens_per_pack: int, ranks: int = 1) -> list[list[list[int]]]:
    """Cut an update into micro-batches: one list per rank, equally long, of lists of indices of rows.

    Each holds at most `tokens_per_pack` tokens (a longer pair stands alone) and about the same work; where pairs
    are too few, some hold none.
    """
    tokens, work = [tokens_of(row) for row in rows], [_work(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (-work[i], rows[i].id))
    per_rank = max(1, -(-sum(tokens) // (tokens_per_pack * ranks)))
    while (bins := _fill(order, tokens, work, tokens_per_pack, per_rank * ranks)) is None:
        per_rank += 1
    # Dealt in turns, there and back, so that no rank always gets the heaviest.
    turns = [bins[i : i + ranks] for i in range(0, len(bins), ranks)]
    return [[turn[rank if k % 2 == 0 else -1 - rank] for k, turn in enumerate(turns)] for rank in range(ranks)]


def _fill(order, tokens, work, tokens_per_pack, num_bins) -> list[list[int]] | None:
    """Give each pair, heaviest first, to the bin with the least work that has room; None where none has."""
    bins, used, load = [[] for _ in range(num_bins)], [0] * num_bins, [0] * num_bins
    for i in order:
        room = [b for b in range(num_bins) if not bins[b] or used[b] + tokens[i] <= tokens_per_pack]
        if not room:
            return None
        lightest = min(room, key=lambda b: load[b])
        bins[lightest].append(i)
        used[lightest] += tokens[i]
        load[lightest] += work[i]
    return [bins[b] for b in sorted(range(num_bins), key=lambda b: -load[b])]


def _work(row: TokenPair) -> float:
    """Relative cost of a pair: linear layers by token, attention by visible pair (a token of a 1k-token prefix costs
    about a quarter more in a 7B model)."""
    P, C, R = len(row.prompt), len(row.chosen), len(row.rejected)
    return tokens_of(row) + ((P + C) ** 2 + (P + R) ** 2 - P**2) / 8192
