"""Statistics over seeds, against numbers worked by hand and against scipy."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import significance
from sdpo import stats as intervals
from sdpo.errors import UserError


def test_interval_over_seeds():
    # mean 2, standard deviation 1, standard error 1/sqrt(3), t(.975, 2 degrees of freedom) = 4.302653
    half = 4.302653 / 3**0.5
    assert intervals.student([1, 2, 3]) == pytest.approx((2, 2 - half, 2 + half, 3), abs=1e-5)
    assert intervals.student([1, 2, 3, np.nan]).n == 3
    assert intervals.student([5, 5]) == (5, 5, 5, 2)


def test_no_interval_from_one_seed():
    alone = intervals.student([7])
    assert alone.value == 7 and alone.n == 1 and np.isnan([alone.low, alone.high]).all()
    assert np.isnan(intervals.student([]).value)


def test_pairs_on_common_seeds():
    first = pd.Series({0: 5.0, 1: 6.0, 3: 9.0})
    second = pd.Series({1: 1.0, 0: 2.0, 2: 0.0})
    assert significance.paired(first, second).tolist() == [3, 5]
    with pytest.raises(UserError, match="two runs with seed 1"):
        significance.paired(pd.Series([1.0, 2.0], index=[1, 1]), second)


def test_sign_flip_counts_patterns():
    # of the 8 sums +-1 +-2 +-3, those at least as far from 0 as 4 are 4, 6, -4, -6
    assert significance.sign_flip([-1, 2, 3]) == 0.5
    assert significance.sign_flip([0.1] * 6) == 2 / 64 == significance.smallest_p(6)
    assert significance.sign_flip([0, 0, 0]) == 1
    assert np.isnan(significance.sign_flip([]))


def test_sign_flip_agrees_with_scipy():
    differences = np.random.default_rng(0).normal(0.4, 1, 9)
    peer = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=2**9)
    assert significance.sign_flip(differences) == pytest.approx(peer.pvalue, abs=1e-12)
    many = np.random.default_rng(1).normal(0.4, 1, 25)
    assert significance.sign_flip(many) == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.02)


def test_holm():
    # sorted .01 .03 .04, times 3 2 1: .03 .06 .04, and no adjusted value below an earlier one
    assert significance.holm([0.04, 0.01, 0.03]).tolist() == pytest.approx([0.06, 0.03, 0.06])
    assert significance.holm([0.6, 0.7]).tolist() == [1, 1]
    assert significance.holm([]).tolist() == []


def test_wilson_share():
    # Wilson's interval for 0 of 10: [0, z^2 / (10 + z^2)] with z = 1.959964
    z2 = 1.959964**2
    assert intervals.wilson(-np.ones(10)) == pytest.approx((0, 0, z2 / (10 + z2), 10), abs=1e-6)


@pytest.mark.parametrize(
    ("differences", "inert", "said"),
    [
        ([0.1] * 8, False, "higher"),
        ([-0.1] * 8, False, "lower"),
        ([0.1] * 8, True, "the reference was inert"),
        ([0.1, -0.1] * 4, False, "within noise"),
        ([0.1, -0.1] * 4, True, "the reference was inert"),
        ([0.10, 0.11, 0.12], False, "too few seeds to tell"),
        ([0.1, -0.1, 0.1], False, "within noise"),
        ([0.1], False, "one seed: no verdict"),
        ([], False, "no common seed"),
    ],
)
def test_verdict(differences, inert, said):
    difference, p = intervals.student(differences), significance.sign_flip(differences)
    assert significance.verdict(difference, p, num_contrasts=1, inert=inert) == said


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ([0.1] * 8, "higher"),
        ([0.1, -0.1] * 4, "higher, at equal KL within noise"),
        ([-0.1] * 8, "higher, at equal KL lower"),
        ([0.1], "higher, at equal KL not known"),
        ([], "higher"),
    ],
)
def test_what_is_higher_is_said_to_be_so_by_kl_alone(gains, said):
    difference, at_equal_kl = intervals.student([0.1] * 8), intervals.student(gains)
    assert significance.verdict(difference, 0.01, num_contrasts=1, inert=False, at_equal_kl=at_equal_kl) == said
