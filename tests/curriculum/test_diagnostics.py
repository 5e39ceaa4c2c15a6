"""Receipts of chunks, and reasons to doubt an order, worked by hand."""

import hashlib

import numpy as np
import pytest

from sdpo.curriculum import diagnostics
from sdpo.data.pair_table import PairTable
from sdpo.data.preferences import Pair
from sdpo.stats import as_measure, wilson
from sdpo.types import TokenPair


def test_chunk_receipts():
    # A pair passes prompt + chosen - 1 + rejected - 1 tokens through the network: 10, 20 and 60.
    lengths = {"a": (4, 3, 5), "b": (14, 4, 4), "c": (51, 9, 2)}
    rows = [TokenPair(id, *(np.zeros(n, dtype=np.int32) for n in parts)) for id, parts in lengths.items()]
    turns = ({"role": "user", "content": "?"},)
    table = PairTable([Pair(id, source, turns, "+", "-") for id, source in zip("abc", "sus", strict=True)], rows)
    chunks = [np.array([1, 2]), np.array([0])]
    first, second = diagnostics.chunk_receipts(chunks, table, np.array([1.0, 2.0, 4.0]))
    assert first == {
        "chunk": 1,
        "num_pairs": 2,
        "hash": hashlib.sha256(b"b\nc").hexdigest(),
        "sources": {"u": 1, "s": 1},
        "mean_score": 3.0,
        "mean_tokens": 40.0,
        "mean_chosen_tokens": 6.5,
        "mean_rejected_tokens": 3.0,
        "chosen_longer": 0.75,  # one tie, one longer
    }
    assert second["num_pairs"] == 1 and second["chosen_longer"] == 0.0
    assert diagnostics.chunk_receipts(chunks[1:], table, None)[0]["mean_score"] is None


def test_accuracies_by_source():
    accuracies = diagnostics.source_accuracies(
        np.array(["s", "s", "u"]),
        {"score": np.array([4.0, -1.0, 0.0]), "shorter": np.array([2.0, np.nan, -1.0])},
    )
    values = {source: {k: (v["value"], v["n"]) for k, v in by_score.items()} for source, by_score in accuracies.items()}
    assert values == {
        "s": {"score": (0.5, 2), "score_mean": (1.5, 2), "shorter": (1.0, 1)},
        "u": {"score": (0.5, 1), "score_mean": (0.0, 1), "shorter": (0.0, 1)},
    }
    half = 12.7062 * 2.5  # t with 1 degree of freedom; sqrt(((4 - 1.5)^2 + (-1 - 1.5)^2) / 1 / 2) = 2.5
    assert accuracies["s"]["score_mean"]["high"] == pytest.approx(1.5 + half, rel=1e-5)


def source(score, shorter, random_model, mean=0.0, n=1000):
    def accuracy(share):
        right = round(share * n)
        return as_measure(wilson(np.array([1] * right + [-1] * (n - right))))

    mean = {"value": mean, "low": mean - 1, "high": mean + 1, "n": n}
    shares = {"score": score, "shorter": shorter, "random_model": random_model}
    return {name: accuracy(share) for name, share in shares.items()} | {"score_mean": mean}


def test_an_order_that_is_also_the_order_by_length_is_doubted():
    accuracies = {"hard": source(0.4, 0.35, 0.5), "easy": source(0.6, 0.55, 0.4)}
    assert diagnostics.order_warnings(accuracies, "gamma") == [
        "the order by gamma (easy, hard) is also the order by length alone"
    ]


def test_an_order_that_is_also_the_order_by_random_weights_is_doubted():
    accuracies = {"hard": source(0.4, 0.55, 0.4), "easy": source(0.6, 0.35, 0.5)}
    assert diagnostics.order_warnings(accuracies, "gamma") == [
        "the order by gamma (easy, hard) is also the order by a randomly initialised model"
    ]


def test_an_order_with_overlapping_intervals_is_doubted():
    accuracies = {"a": source(0.51, 0.3, 0.3), "b": source(0.52, 0.1, 0.1)}
    assert diagnostics.order_warnings(accuracies, "gamma") == [
        "the intervals of b and a overlap: their order by gamma may be chance"
    ]


def test_another_order_than_the_baselines_is_not_doubted():
    accuracies = {"a": source(0.7, 0.3, 0.4, mean=-9), "b": source(0.5, 0.4, 0.5, mean=9)}
    assert diagnostics.order_warnings(accuracies, "gamma") == []
    assert diagnostics.order_warnings({"a": accuracies["a"]}, "gamma") == []
    by_mean = diagnostics.order_warnings(accuracies, "gamma", by_mean=True)
    assert by_mean == [
        "the order by mean gamma (b, a) is also the order by length alone",
        "the order by mean gamma (b, a) is also the order by a randomly initialised model",
    ]


def test_sources_of_equal_accuracy_are_ordered_by_the_mean():
    accuracies = {"a": source(0.0, 0.3, 0.6, mean=-5), "b": source(0.0, 0.4, 0.5, mean=-3)}
    first, second = diagnostics.order_warnings(accuracies, "prompt_length")
    assert first == "the order by prompt_length (b, a) is also the order by length alone"
    assert second.startswith("the intervals of b and a overlap")
