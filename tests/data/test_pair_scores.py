"""Numbers that came with the pairs, from the data and from files that name pairs by their ids."""

import numpy as np
import pytest

from sdpo.data import pair_scores
from sdpo.data.pair_table import PairTable
from sdpo.data.preferences import Pair
from sdpo.errors import UserError
from sdpo.types import TokenPair

TURNS, NOTHING = ({"role": "user", "content": "?"},), np.zeros(1, dtype=np.int32)


def table(**scores):
    pairs = [Pair(id, "s", TURNS, "+", "-", pair_score=score) for id, score in scores.items()]
    return PairTable(pairs, [TokenPair(id, NOTHING, NOTHING, NOTHING) for id in scores])


def test_the_data_brings_the_scores():
    assert pair_scores.read(table(a=0.0, b=-1.5), None).tolist() == [0.0, -1.5]
    with pytest.raises(UserError, match="which 1 of 2 lack in the data, b among them; add the column"):
        pair_scores.read(table(a=0.0, b=None), None)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "pair_score,id,note\n2,b,x\n-1e1,a,\n7,elsewhere,\n"),
        ("a.jsonl", '{"id": "a", "pair_score": -10}\n{"id": "b", "pair_score": "2"}'),
        ("a.json", '[{"id": "b", "pair_score": 2.0}, {"id": "a", "pair_score": -10.0}]'),
    ],
)
def test_a_file_is_joined_by_id(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    found = pair_scores.read(table(a=5.0, b=None), str(tmp_path / name))  # not the data's own score
    assert found.tolist() == [-10.0, 2.0]


def test_ids_that_are_numbers_are_joined_as_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 7, "pair_score": 1}')
    assert pair_scores.read(table(**{"7": None}), str(tmp_path / "a.jsonl")).tolist() == [1.0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("id,pair_score\na,1\n", "which 1 of 2 lack in .*a.csv, b among them"),
        ("id,pair_score\na,1\nb,\n", "which 1 of 2 lack in .*a.csv, b among them"),
        ("id,score\na,1\nb,2\n", "which 2 of 2 lack in .*a.csv, a among them"),
        ("pair_score\n1\n", "a.csv, row 1: field 'id' is missing or null"),
        ("id,pair_score\na,easy\nb,1\n", "a.csv, row 1: field 'pair_score' is 'easy', not a number"),
        ("id,pair_score\na,1\na,2\nb,2\n", "a.csv, row 2: the id 'a' was used before"),
    ],
)
def test_what_a_file_lacks_is_named(tmp_path, text, sentence):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=sentence):
        pair_scores.read(table(a=None, b=None), str(tmp_path / "a.csv"))
