"""Streams worked by hand; micro-batches hold every pair once, within the budget, with about the same work."""

import numpy as np
import pytest

from sdpo.model.packing import micro_batches, pack, scoring_packs, tokens_of
from sdpo.types import TokenPair

END = [0]  # the closing token of every stream


def row(prompt, chosen, rejected, name=""):
    return TokenPair(name, *(np.array(x, dtype=np.int32) for x in (prompt, chosen, rejected)))


def rows_of(lengths):
    """One row of ones per (prompt, chosen, rejected) lengths."""
    return [row(*([1] * n for n in three), name=f"{i:03d}") for i, three in enumerate(lengths)]


def test_a_prompt_appears_once_and_rejected_positions_restart_after_it():
    packed = pack([row([5, 6, 7], [10, 11], [20, 21, 22])])
    assert packed.tokens_T.tolist() == [5, 6, 7, 10, 20, 21] + END
    assert packed.positions_T.tolist() == [0, 1, 2, 3, 3, 4] + [0]
    assert packed.keys_K.tolist() == [0, 1, 2, 3, 0, 1, 2, 4, 5] + [6]
    assert (packed.lengths_S, packed.own_S) == ([4, 5, 1], [4, 2, 1])
    # The last prompt token predicts the first token of both responses.
    assert packed.rows_R.tolist() == [2, 3, 2, 4, 5] + [6]
    assert packed.targets_R.tolist() == [10, 11, 20, 21, 22] + END
    assert packed.branches_R.tolist() == [0, 0, 1, 1, 1] + [2]


def test_one_token_responses_and_demonstrations_add_no_sequence():
    packed = pack([row([5, 6, 7, 8], [10], [20]), row([9], [11, 12], [])])
    assert packed.tokens_T.tolist() == [5, 6, 7, 8, 9, 11] + END
    assert (packed.lengths_S, packed.own_S) == ([4, 2, 1], [4, 2, 1])
    assert packed.rows_R.tolist() == [3, 3, 4, 5] + [6]
    assert packed.branches_R.tolist() == [0, 1, 2, 2] + [4]


@pytest.mark.parametrize(("rows", "num_closing"), [([], 4), ([row([5], [10], [20])], 3), ([row([5] * 9, [6], [7])], 2)])
def test_streams_and_responses_are_at_least_four_tokens_long(rows, num_closing):
    packed = pack(rows)
    assert packed.num_pairs == len(rows)
    assert packed.branches_R.tolist().count(2 * len(rows)) == num_closing
    assert min(len(packed.tokens_T), len(packed.rows_R)) == 4


def test_no_padding():
    rows = rows_of([(3, 2, 5), (7, 1, 4), (1, 9, 2)])
    assert sum(map(tokens_of, rows)) == (3 + 1 + 4) + (7 + 0 + 3) + (1 + 8 + 1)
    assert len(pack(rows).tokens_T) == sum(map(tokens_of, rows)) + len(END)


LENGTHS = [tuple(three) for three in np.random.default_rng(0).integers(1, 60, (37, 3)).tolist()]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("budget", [90, 400, 100_000])
def test_micro_batches_hold_every_pair_once_within_budget_and_evenly(ranks, budget):
    rows = rows_of(LENGTHS + [(200, 60, 60)])
    plan = micro_batches(rows, budget, ranks)
    assert sorted(i for packs in plan for members in packs for i in members) == list(range(len(rows)))
    assert len(plan) == ranks and len({len(packs) for packs in plan}) == 1
    for packs in plan:
        for members in packs:
            assert len(members) == 1 or sum(tokens_of(rows[i]) for i in members) <= budget
    totals = [sum(tokens_of(rows[i]) for members in packs for i in members) for packs in plan]
    assert max(totals) - min(totals) <= max(tokens_of(row) for row in rows)


def test_ranks_without_pairs_get_empty_micro_batches():
    assert sorted(micro_batches(rows_of([(3, 3, 3)]), 100, ranks=3)) == [[[]], [[]], [[0]]]


def test_scoring_packs_depend_on_the_rows_alone():
    rows = rows_of(LENGTHS)
    shuffled = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    by_id = [[[some[i].id for i in members] for members in scoring_packs(some, 300)] for some in (rows, shuffled)]
    assert by_id[0] == by_id[1]
    assert all(sum(tokens_of(rows[i]) for i in members) <= 300 for members in scoring_packs(rows, 300))
