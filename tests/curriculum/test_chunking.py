"""The settings that all splits share, and the checks on the chunks that a split returns."""

import json
from functools import partial

import pytest

from sdpo.curriculum import chunking
from sdpo.curriculum.chunking import Split
from sdpo.errors import UserError
from sdpo.types import SplitRow

ROWS = [SplitRow("a", "s", "p", 9), SplitRow("b", "s", "p", 9), SplitRow("c", "s", "q", 9), SplitRow("d", "s", "r", 9)]
SCORES = {"a": 4.0, "b": 1.0, "c": 2.0, "d": 3.0}
BY_PAIR = {"name": "easy_to_hard", "level": "pair", "num_chunks": 3}
CURRENT = {"name": "gamma", "model": "current"}


def test_pairs_of_one_prompt_share_a_chunk_unless_told_otherwise():
    assert chunking.divide(chunking.bind_split(BY_PAIR), ROWS, SCORES, 0) == [["d"], ["a", "b"], ["c"]]
    nested = chunking.bind_split(BY_PAIR | {"disjoint_prompts": False, "num_chunks": 4})
    assert chunking.divide(nested, ROWS, SCORES, 0) == [["a"], ["d"], ["c"], ["b"]]


def test_the_order_inside_a_chunk_is_that_of_the_scores():
    kept = {"keep": 0.75, "within": "score"}
    assert chunking.divide(chunking.bind_split({"name": "all_at_once", **kept}), ROWS, SCORES, 0) == [["a", "d", "c"]]
    by_pair = BY_PAIR | {"num_chunks": 2, "within": "score"}
    assert chunking.divide(chunking.bind_split(by_pair), ROWS, SCORES, 0) == [["d"], ["a", "c", "b"]]
    hardest_first = by_pair | {"name": "hard_to_easy"}
    assert chunking.divide(chunking.bind_split(hardest_first), ROWS, SCORES, 0) == [["b", "c", "a"], ["d"]]
    equal = dict.fromkeys(SCORES, 0.0)
    assert chunking.divide(chunking.bind_split(hardest_first), ROWS, equal, 0)[0] == ["c", "d"]


def test_keep_takes_the_easiest_share():
    split = chunking.bind_split({"name": "all_at_once", "keep": 0.5})
    assert split.needs_scores
    assert chunking.divide(split, ROWS, SCORES, 0) == [["a", "d"]]


def test_only_splits_that_read_scores_need_them():
    assert chunking.bind_split(BY_PAIR).needs_scores
    assert not chunking.bind_split({"name": "random", "num_chunks": 2}).needs_scores
    assert chunking.bind_split({"name": "random", "num_chunks": 2, "within": "score"}).needs_scores


def test_the_remaining_rows_are_cut_into_the_missing_chunks():
    split = chunking.bind_split(BY_PAIR | {"keep": 0.75})
    assert chunking.divide(split.for_rest(2), ROWS[2:], SCORES, 0) == [["d"], ["c"]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, "split.keep must be above 0 and at most 1, not 0.0"),
        ({"within": "order"}, "split.within is 'order'; it can be shuffled, score"),
        ({"disjoint_prompts": "no"}, "split.disjoint_prompts must be true or false"),
        ({"num_chunks": 0}, "split.num_chunks must be at least 1, not 0"),
        ({"level": "pairs"}, "expected one of \\[source, pair\\]"),
        ({"chunks": 2}, "unknown key chunks"),
    ],
)
def test_wrong_settings_are_refused_before_data_is_read(settings, message):
    with pytest.raises(UserError, match=message):
        chunking.bind_split(BY_PAIR | settings)


@pytest.mark.parametrize(
    ("score", "split", "message"),
    [
        ({"name": "gama"}, BY_PAIR, "sdpo.variants.score has no 'gama'; it has gamma"),
        ({"name": "gamma"}, BY_PAIR, "score.model is None; for score=gamma it must be initial or current"),
        ({"name": "gamma", "model": "first"}, BY_PAIR, "score.model is 'first'; for score=gamma it must be initial"),
        ({"name": "length_gap", "model": "current"}, BY_PAIR, "for score=length_gap it must be left out"),
        (CURRENT, {"name": "by_source", "keep": 0.5}, "split=by_source does not take one chunk after another by score"),
        (CURRENT, {"name": "random", "num_chunks": 2, "keep": 0.5}, "split=random does not take one chunk after"),
    ],
)
def test_scores_that_do_not_go_with_the_split_are_refused_before_data_is_read(score, split, message):
    with pytest.raises(UserError, match=message):
        chunking.bind_score(score, chunking.bind_split(split))


def test_a_score_that_the_split_does_not_read_is_not_checked_against_it():
    chunking.bind_score(CURRENT, chunking.bind_split({"name": "by_source"}))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([["a", "b"], ["c"]], "left out rows"),
        ([["a", "b"], ["c", "d", "e"]], "made some up"),
        ([["a", "b", "c"], ["c", "d"]], "more often"),
        ([["a", "b", "c", "d"], []], "empty chunk"),
        ([["a", "c"], ["b", "d"]], "one prompt into two chunks"),
    ],
)
def test_a_split_with_wrong_chunks_is_refused(made, message):
    def broken(rows):
        return made

    with pytest.raises(UserError, match=message):
        chunking.divide(Split(partial(broken), 1.0, True), ROWS, None, 0)


def test_a_saved_split_is_replayed_with_what_it_dropped(tmp_path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"chunks": [["d"], ["b", "a"]], "dropped": ["c"]}))
    split = chunking.bind_split({"name": "replay", "path": str(path)})
    assert chunking.divide(split, ROWS, None, 0) == [["d"], ["b", "a"]]
