"""Placebo references keep the height of the bound and lose the pairs."""

import numpy as np
import pytest

from sdpo import placebo

INITIAL = np.array([[-10, -12], [-20, -18], [-5, -9]], dtype=np.float32)
RULE = np.array([[-9, -13], [-20, -20], [-2, -9]], dtype=np.float32)  # shifts (1, -1), (0, -2), (3, 0)


def gamma(logps):
    return logps[:, 0] - logps[:, 1]


def test_none_is_the_rule():
    assert placebo.none(INITIAL, RULE, 0) is RULE


def test_mean_shift_by_hand():
    shifted = placebo.mean_shift(INITIAL, RULE, 0)
    np.testing.assert_allclose(shifted, INITIAL + np.array([4 / 3, -1]), rtol=1e-6)
    assert shifted.dtype == np.float32
    np.testing.assert_allclose(gamma(shifted).mean(), gamma(RULE).mean(), rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_permute_gives_every_shift_to_another_pair(seed):
    permuted = placebo.permute(INITIAL, RULE, seed)
    assert sorted(map(tuple, permuted - INITIAL)) == sorted(map(tuple, RULE - INITIAL))
    assert (permuted != RULE).any(axis=1).all()
    assert gamma(permuted).mean() == gamma(RULE).mean()
    assert np.array_equal(permuted, placebo.permute(INITIAL, RULE, seed))
