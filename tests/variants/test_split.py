"""Splits by hand, and properties of every split."""

import json

import numpy as np
import pytest

from sdpo.errors import UserError
from sdpo.types import SplitRow
from sdpo.variants import split as splits


def rows_of(*sources):
    """Rows a0, a1, ... of sources (name, number of rows); each row has its own prompt and 10 tokens."""
    return [SplitRow(f"{s}{i}", s, f"{s}{i}", 10) for s, n in sources for i in range(n)]


ROWS = rows_of(("b", 2), ("a", 4))
SCORES = {"b0": 3.0, "b1": -1.0, "a0": 1.0, "a1": 2.0, "a2": 0.5, "a3": -9.0}  # accuracies: b 1/2, a 3/4


def sizes(chunks):
    return [len(chunk) for chunk in chunks]


def test_all_at_once():
    assert splits.all_at_once(ROWS) == [["b0", "b1", "a0", "a1", "a2", "a3"]]


def test_by_source():
    assert splits.by_source(ROWS) == [["b0", "b1"], ["a0", "a1", "a2", "a3"]]
    assert splits.by_source(ROWS, order=["a", "b"]) == [["a0", "a1", "a2", "a3"], ["b0", "b1"]]
    with pytest.raises(UserError, match=r"split.order is \['a'\], but the sources are \['b', 'a'\]"):
        splits.by_source(ROWS, order=["a"])


def test_a_prompt_of_two_sources_goes_with_the_earlier_one():
    rows = [SplitRow("1", "b", "shared", 10), SplitRow("2", "a", "shared", 10), SplitRow("3", "b", "own", 10)]
    assert splits.by_source(rows, order=["a", "b"]) == [["1", "2"], ["3"]]
    with pytest.raises(UserError, match="every prompt of source a is in an earlier source too"):
        splits.by_source(rows, order=["b", "a"])


def test_easy_to_hard_by_source_sorts_by_accuracy_or_by_mean():
    assert splits.easy_to_hard(ROWS, SCORES) == splits.by_source(ROWS, order=["a", "b"])
    assert splits.easy_to_hard(ROWS, SCORES, measure="mean") == splits.by_source(ROWS, order=["b", "a"])
    assert splits.hard_to_easy(ROWS, SCORES) == splits.by_source(ROWS, order=["b", "a"])


def test_easy_to_hard_by_source_joins_neighbours():
    rows = rows_of(("a", 2), ("b", 2), ("c", 4))
    scores = {row.id: {"a": 1.0, "b": 3.0, "c": 2.0}[row.source] for row in rows}  # equal accuracies: the mean decides
    chunks = splits.easy_to_hard(rows, scores, num_chunks=2)
    assert [{id[0] for id in chunk} for chunk in chunks] == [{"b"}, {"a", "c"}]
    with pytest.raises(UserError, match=r"4 chunks were asked for, but there are only 3 sources \(8 pairs"):
        splits.easy_to_hard(rows, scores, num_chunks=4)


def test_easy_to_hard_by_pair():
    chunks = splits.easy_to_hard(ROWS, SCORES, level="pair", num_chunks=3)
    assert chunks == [["b0", "a1"], ["a0", "a2"], ["b1", "a3"]]
    assert splits.hard_to_easy(ROWS, SCORES, level="pair", num_chunks=3) == chunks[::-1]


def test_chunks_equal_in_tokens():
    tokens = {"b0": 60}  # the easiest pair is as long as all others together
    rows = [row._replace(tokens=tokens.get(row.id, 12)) for row in ROWS]
    chunks = splits.easy_to_hard(rows, SCORES, level="pair", num_chunks=2, equal="tokens")
    assert chunks == [["b0"], ["b1", "a0", "a1", "a2", "a3"]]
    flipped = {id: -score for id, score in SCORES.items()}  # now b0 is last and must leave pairs for every chunk
    chunks = splits.easy_to_hard(rows, flipped, level="pair", num_chunks=5, equal="tokens")
    assert sizes(chunks) == [2, 1, 1, 1, 1] and chunks[-1] == ["b0"]


def test_random_is_seeded_and_even():
    rows = rows_of(("a", 7), ("b", 4))
    chunks = splits.random(rows, 0, num_chunks=3)
    assert sorted(sizes(chunks)) == [3, 4, 4]
    assert chunks == splits.random(rows, 0, num_chunks=3) != splits.random(rows, 1, num_chunks=3)


def test_stratified_chunks_have_the_same_mix_of_sources():
    rows = rows_of(("a", 60), ("b", 12))
    for chunk in splits.stratified(rows, 0, num_chunks=3):
        assert sum(id.startswith("a") for id in chunk) == 20 and len(chunk) == 24
    paper = splits.stratified(rows, 0, num_chunks=2, shares=[0.1667, 0.8333])
    assert [sum(id.startswith("a") for id in chunk) for chunk in paper] == [10, 50] and sizes(paper) == [
        12,
        60,
    ]


@pytest.mark.parametrize("shares", [[0.5], [0.9, 0.2], [0.0, 1.0]])
def test_stratified_refuses_shares_that_do_not_fit(shares):
    with pytest.raises(UserError, match="split.shares must be 2 positive numbers that sum to 1"):
        splits.stratified(ROWS, 0, num_chunks=2, shares=shares)


def test_stratified_names_the_source_that_is_too_small():
    with pytest.raises(UserError, match=r"but there are only 2 prompts of source b \(2 pairs"):
        splits.stratified(ROWS, 0, num_chunks=3)


def test_repeat():
    assert splits.repeat(ROWS, num=3) == splits.all_at_once(ROWS) * 3


def test_replay(tmp_path):
    chunks, path = [["a1", "b0"], ["b1", "a0"]], tmp_path / "split.json"
    path.write_text(json.dumps({"chunks": chunks, "dropped": ["a2", "a3"]}))
    assert splits.replay(ROWS, path=str(path)) == chunks
    with pytest.raises(UserError, match="1 of its pairs are not in the training data and 0 training pairs"):
        splits.replay(ROWS[:-1], path=str(path))
    with pytest.raises(UserError, match="nowhere.json is not the split.json of a run"):
        splits.replay(ROWS, path="nowhere.json")


def test_too_few_pairs():
    with pytest.raises(UserError, match=r"7 chunks were asked for, but there are only 6 prompts \(6 pairs"):
        splits.random(ROWS, 0, num_chunks=7)


EVERY_SPLIT = {
    "all_at_once": lambda rows, scores: splits.all_at_once(rows),
    "by_source": lambda rows, scores: splits.by_source(rows, order=["a", "b", "c"]),
    "easy_to_hard": splits.easy_to_hard,
    "pair": lambda rows, scores: splits.easy_to_hard(rows, scores, level="pair", num_chunks=4),
    "tokens": lambda rows, scores: splits.hard_to_easy(rows, scores, level="pair", num_chunks=4, equal="tokens"),
    "random": lambda rows, scores: splits.random(rows, 3, num_chunks=4),
    "stratified": lambda rows, scores: splits.stratified(rows, 3, num_chunks=4),
}


@pytest.mark.parametrize("split", EVERY_SPLIT.values(), ids=EVERY_SPLIT)
def test_chunks_are_a_partition_by_prompt_and_do_not_depend_on_the_order_of_rows(split):
    rng = np.random.default_rng(0)
    rows = [
        SplitRow(f"{i:03}", str(rng.choice(["a", "b", "c"])), int(rng.integers(80)), int(rng.integers(5, 99)))
        for i in range(200)
    ]
    scores = dict(zip((row.id for row in rows), rng.normal(size=200), strict=True))
    chunks = split(rows, scores)
    assert sorted(sum(chunks, [])) == [row.id for row in rows] and all(chunks)
    prompt = {row.id: row.prompt for row in rows}
    prompts = [{prompt[id] for id in chunk} for chunk in chunks]
    assert sum(map(len, prompts)) == len(set().union(*prompts))

    backwards = split(rows[::-1], dict(reversed(scores.items())))
    assert [chunk[::-1] for chunk in backwards] == chunks
