"""Receipts of a split by hand."""

import hashlib

import numpy as np
import pytest

from sdpo import receipts
from sdpo.splits import Row


def test_chunk_receipts():
    rows = [Row("a", "s", "p", 10), Row("b", "u", "q", 20), Row("c", "s", "r", 60)]
    lengths = {"a": (3, 5), "b": (4, 4), "c": (9, 2)}
    first, second = receipts.chunk_receipts(
        [["b", "c"], ["a"]], rows, lengths, {"a": 1.0, "b": 2.0, "c": 4.0}
    )
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
    assert receipts.chunk_receipts([["a"]], rows, lengths)[0]["mean_score"] is None


def test_wilson_by_hand():
    # 8 of 10: centre (0.8 + 0.19207) / 1.38415, half-width 1.959964 / 1.38415 * sqrt(0.016 + 0.0096037)
    interval = receipts.wilson(np.array([1] * 8 + [-1] * 2))
    assert interval == {
        "value": 0.8,
        "low": pytest.approx(0.49016, abs=1e-4),
        "high": pytest.approx(0.94331, abs=1e-4),
        "n": 10,
    }
    assert receipts.wilson(np.array([0, 0]))["value"] == 0.5


def test_accuracies_of_four_rulers():
    accuracies = receipts.source_accuracies(
        ["s", "s", "u"],
        chosen_logp_N=np.array([-4.0, -9.0, -6.0]),
        rejected_logp_N=np.array([-6.0, -8.0, -6.0]),
        chosen_tokens_N=np.array([2, 9, 3]),
        rejected_tokens_N=np.array([6, 4, 3]),
        random_gamma_N=np.array([-1.0, -1.0, 1.0]),
    )
    values = {source: {k: v["value"] for k, v in measures.items()} for source, measures in accuracies.items()}
    assert values == {
        "s": {"gamma": 0.5, "gamma_per_token": 0.5, "shorter": 0.5, "random_model": 0.0},
        "u": {"gamma": 0.5, "gamma_per_token": 0.5, "shorter": 0.5, "random_model": 1.0},
    }


def ruler(share, n=1000):
    right = round(share * n)
    return receipts.wilson(np.array([1] * right + [-1] * (n - right)))


def test_an_order_that_length_gives_too_is_doubted():
    accuracies = {
        "easy": {"gamma": ruler(0.6), "shorter": ruler(0.55)},
        "hard": {"gamma": ruler(0.4), "shorter": ruler(0.35)},
    }
    assert receipts.order_warnings(accuracies) == [
        "the order by gamma (easy, hard) is also what length alone gives"
    ]


def test_an_order_within_the_noise_is_doubted():
    accuracies = {
        "a": {"gamma": ruler(0.51), "shorter": ruler(0.3)},
        "b": {"gamma": ruler(0.52), "shorter": ruler(0.1)},
    }
    assert receipts.order_warnings(accuracies) == [
        "the intervals of b and a overlap: their order by gamma may be chance"
    ]


def test_an_order_of_its_own_is_not_doubted():
    accuracies = {
        "a": {"gamma": ruler(0.7), "shorter": ruler(0.3), "random_model": ruler(0.4)},
        "b": {"gamma": ruler(0.5), "shorter": ruler(0.4), "random_model": ruler(0.5)},
    }
    assert receipts.order_warnings(accuracies) == []
    assert receipts.order_warnings({"a": accuracies["a"]}) == []
