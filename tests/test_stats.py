"""Means with their intervals and the length-controlled win rate, by hand."""

import numpy as np
import pytest

from sdpo.stats import length_controlled, mean, share, share_above, wilson


def test_mean_and_its_interval():
    # 1/sqrt(3), the standard error, times the 97.5 % quantile of Student's t with 2 degrees of freedom
    found = mean(np.array([1, 2, 3], dtype=np.float32))
    assert (found["value"], found["n"]) == (2.0, 3)
    assert found["high"] - 2 == 2 - found["low"] == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert mean(np.array([True]))["value"] == 1.0 and mean(np.array([1.0]))["low"] is None
    assert mean([]) == mean(np.array([])) == {"value": None, "low": None, "high": None, "n": 0}


def test_wilson_by_hand():
    # 8 of 10: centre (0.8 + 0.19207) / 1.38415, half-width 1.959964 / 1.38415 * sqrt(0.016 + 0.0096037)
    assert wilson(np.array([1] * 8 + [-1] * 2)) == (
        0.8,
        pytest.approx(0.49016, abs=1e-4),
        pytest.approx(0.94331, abs=1e-4),
        10,
    )
    assert wilson(np.array([0, 0])).value == 0.5
    assert np.isnan(wilson(np.array([])).value)


def test_a_share_has_wilson_s_interval():
    # 3 of 3: from 1 / (1 + 1.959964^2 / 3) to 1, where Student's would be [1, 1]; what is undefined does not count
    assert share(np.array([1.0, np.nan, 1.0, 1.0])) == {
        "value": 1.0,
        "low": pytest.approx(0.438503, abs=1e-6),
        "high": 1.0,
        "n": 3,
    }
    assert share([True, False]) == {
        "value": 0.5,
        "low": pytest.approx(0.094531, abs=1e-6),
        "high": pytest.approx(0.905469, abs=1e-6),
        "n": 2,
    }
    assert share([]) == {"value": None, "low": None, "high": None, "n": 0}


def test_ties_are_half():
    assert share_above(np.array([2.0, -1.0, 0.0])).tolist() == [1.0, 0.0, 0.5]
    assert np.isnan(share_above(np.array([np.nan])))


def grouped(*groups):
    """Wins and length differences of groups (number of answers, number of wins, length difference)."""
    wins = np.concatenate([np.arange(n) < won for n, won, _ in groups]).astype(float)
    return wins, np.concatenate([np.full(n, longer) for n, _, longer in groups])


def test_a_gain_only_by_length_disappears_at_equal_length():
    # 80 % wins if longer by one, 20 % if shorter by one: logits +-ln 4, so the logit at equal length is 0
    wins, longer = grouped((300, 240, 1), (100, 20, -1))
    assert wins.mean() == 0.65
    assert length_controlled(wins, longer)["value"] == pytest.approx(0.5, abs=1e-3)


def test_a_gain_at_every_length_stays():
    # Logits ln 9 and ln 3/2 at +-1; at equal length their mean: odds sqrt(9 * 3/2), a win rate of .786
    wins, longer = grouped((200, 180, 1), (200, 120, -1))
    assert length_controlled(wins, longer)["value"] == pytest.approx(13.5**0.5 / (1 + 13.5**0.5), abs=1e-3)


def test_equal_lengths_and_one_sided_wins():
    # Without length differences it is a Wald interval of a logit: sd 1 / sqrt(n p (1 - p)) = 1 / sqrt(18.75)
    found = length_controlled(*grouped((100, 75, 0)))
    assert found["value"] == pytest.approx(0.75, abs=1e-3)
    odds = 3 * np.exp(1.96 / 18.75**0.5)
    assert found["high"] == pytest.approx(odds / (1 + odds), abs=1e-3)
    all_won = length_controlled(*grouped((20, 20, 0)))
    assert 0.97 < all_won["value"] < 1 and all_won["low"] < 0.9
