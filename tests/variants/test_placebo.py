"""Placebo references keep the mean gamma of the reference but not its values for single pairs."""

import numpy as np
import pandas as pd
import pytest

from sdpo.variants import placebo

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


def test_a_moving_reference_has_its_placebo_in_every_window(run, tmp_path):
    """Two windows of an epoch each: the log-probs of the last one are S's plus one shift."""
    every = ["split=all_at_once", "optim.epochs=2", "optim.pairs_per_update=33"]
    folder = run(*every, "reference=periodic", "reference.updates=2", "reference.placebo=mean_shift")
    read = pd.read_parquet(folder / "steps" / "1" / "reference.parquet").set_index("id")
    tables = map(pd.read_parquet, (tmp_path / "store").glob("logprobs/*/logprobs.parquet"))
    (initial,) = (table for table in tables if set(table["id"]) == set(read.index))
    shift = (read - initial.set_index("id")).to_numpy()
    assert np.abs(shift.mean(0)).max() > 0.1
    np.testing.assert_allclose(shift, np.broadcast_to(shift[0], shift.shape), atol=1e-4)
