"""Receipts of a split by hand."""

import hashlib

import numpy as np
import pytest

from sdpo.curriculum import diagnostics
from sdpo.variants.split import Row


def test_chunk_receipts():
    rows = [Row("a", "s", "p", 10), Row("b", "u", "q", 20), Row("c", "s", "r", 60)]
    lengths = {"a": (3, 5), "b": (4, 4), "c": (9, 2)}
    first, second = diagnostics.chunk_receipts([["b", "c"], ["a"]], rows, lengths, {"a": 1.0, "b": 2.0, "c": 4.0})
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
    assert diagnostics.chunk_receipts([["a"]], rows, lengths)[0]["mean_score"] is None


def test_wilson_by_hand():
    # 8 of 10: centre (0.8 + 0.19207) / 1.38415, half-width 1.959964 / 1.38415 * sqrt(0.016 + 0.0096037)
    interval = diagnostics.wilson(np.array([1] * 8 + [-1] * 2))
    assert interval == {
        "value": 0.8,
        "low": pytest.approx(0.49016, abs=1e-4),
        "high": pytest.approx(0.94331, abs=1e-4),
        "n": 10,
    }
    assert diagnostics.wilson(np.array([0, 0]))["value"] == 0.5


def test_accuracies_by_source():
    accuracies = diagnostics.source_accuracies(
        {"a": "s", "b": "s", "c": "u"},
        {"score": {"a": 4.0, "b": -1.0, "c": 0.0}, "shorter": {"a": 2.0, "c": -1.0, "elsewhere": 1.0}},
    )
    values = {source: {k: (v["value"], v["n"]) for k, v in rulers.items()} for source, rulers in accuracies.items()}
    assert values == {
        "s": {"score": (0.5, 2), "score_mean": (1.5, 2), "shorter": (1.0, 1)},
        "u": {"score": (0.5, 1), "score_mean": (0.0, 1), "shorter": (0.0, 1)},
    }
    half = 1.959964 * 2.5  # sqrt(((4 - 1.5)^2 + (-1 - 1.5)^2) / 1 / 2) = 2.5
    assert accuracies["s"]["score_mean"]["high"] == pytest.approx(1.5 + half)


def source(score, shorter, random_model, mean=0.0, n=1000):
    def ruler(share):
        right = round(share * n)
        return diagnostics.wilson(np.array([1] * right + [-1] * (n - right)))

    mean = {"value": mean, "low": mean - 1, "high": mean + 1, "n": n}
    rulers = {"score": score, "shorter": shorter, "random_model": random_model}
    return {name: ruler(share) for name, share in rulers.items()} | {"score_mean": mean}


def test_an_order_that_length_gives_too_is_doubted():
    accuracies = {"hard": source(0.4, 0.35, 0.5), "easy": source(0.6, 0.55, 0.4)}
    assert diagnostics.order_warnings(accuracies, "gamma") == [
        "the order by gamma (easy, hard) is also what length alone gives"
    ]


def test_an_order_that_random_weights_give_too_is_doubted():
    accuracies = {"hard": source(0.4, 0.55, 0.4), "easy": source(0.6, 0.35, 0.5)}
    assert diagnostics.order_warnings(accuracies, "gamma") == [
        "the order by gamma (easy, hard) is also what a randomly initialised model gives"
    ]


def test_an_order_within_the_noise_is_doubted():
    accuracies = {"a": source(0.51, 0.3, 0.3), "b": source(0.52, 0.1, 0.1)}
    assert diagnostics.order_warnings(accuracies, "gamma") == [
        "the intervals of b and a overlap: their order by gamma may be chance"
    ]


def test_an_order_of_its_own_is_not_doubted():
    accuracies = {"a": source(0.7, 0.3, 0.4, mean=-9), "b": source(0.5, 0.4, 0.5, mean=9)}
    assert diagnostics.order_warnings(accuracies, "gamma") == []
    assert diagnostics.order_warnings({"a": accuracies["a"]}, "gamma") == []
    by_mean = diagnostics.order_warnings(accuracies, "gamma", by_mean=True)
    assert by_mean == [
        "the order by mean gamma (b, a) is also what length alone gives",
        "the order by mean gamma (b, a) is also what a randomly initialised model gives",
    ]


def test_sources_of_equal_accuracy_are_told_apart_by_the_mean():
    accuracies = {"a": source(0.0, 0.3, 0.6, mean=-5), "b": source(0.0, 0.4, 0.5, mean=-3)}
    first, second = diagnostics.order_warnings(accuracies, "prompt_length")
    assert first == "the order by prompt_length (b, a) is also what length alone gives"
    assert second.startswith("the intervals of b and a overlap")
