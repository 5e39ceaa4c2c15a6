"""Statistics over seeds: Student-t intervals, paired differences, exact sign-flip tests, Holm's correction.

The unit is a seed: arms with the same seed share S, pairs and evaluation prompts, so they are compared seed by seed.
"""

from math import nan

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from sdpo.errors import UserError
from sdpo.stats import Interval, student

LEVEL = 0.05  # significance level of the verdicts, after Holm's correction
INERT = 0.02  # with a smaller leverage a reference changed no gradient weight that matters
LEFT_S = 5.0  # nats of KL to S on the laboratory's short answers; beyond it little of S is left in a model
EXACT_SEEDS = 20  # 2^20 sign flips take 10 MB and a few milliseconds


def by_group(frame: pd.DataFrame, keys: list[str], column: str) -> pd.DataFrame:
    """`student` of `column` for each group of `keys`, in order of appearance: keys, value, low, high, seeds."""
    rows = [(*key, *student(group[column])) for key, group in frame.groupby(keys, sort=False, dropna=False)]
    return pd.DataFrame(rows, columns=[*keys, "value", "low", "high", "seeds"])


def paired(first: pd.Series, second: pd.Series) -> np.ndarray:
    """first - second on the seeds (the index) that both have. Raises UserError if one of them has a seed twice."""
    for side in (first, second):
        if side.index.has_duplicates:
            twice = sorted(set(side.index[side.index.duplicated()]))
            raise UserError(f"an arm has two runs with seed {twice[0]}; give folders in which it runs once")
    return (first - second).dropna().to_numpy()


def sign_flip(differences: ArrayLike) -> float:
    """Two-sided p-value of the sign-flip test: the chance of a mean at least as far from 0 if every sign were random.

    Counts all 2^n sign patterns of up to 20 differences, and 100,000 random ones of more; nan for no differences.
    """
    differences_N = np.asarray(differences, dtype=float)
    if len(differences_N) == 0:
        return nan
    if len(differences_N) > EXACT_SEEDS:
        drawn = stats.permutation_test(
            (differences_N,), np.mean, permutation_type="samples", vectorized=True, n_resamples=99_999, rng=0
        )
        return float(drawn.pvalue)
    sums = np.zeros(1)
    for difference in differences_N:
        sums = np.concatenate([sums + difference, sums - difference])
    rounding = 1e-12 * np.abs(differences_N).sum()
    return float(np.mean(np.abs(sums) >= abs(differences_N.sum()) - rounding))


def smallest_p(num_seeds: int) -> float:
    """The smallest p-value of `sign_flip` with this many seeds: 2 of 2^n sign patterns."""
    return 2.0 ** (1 - num_seeds)


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm's adjusted p-values, which bound the family-wise error. A nan stays nan and counts as a contrast."""
    p_N = np.asarray(p_values, dtype=float)
    order = np.argsort(p_N)  # nan last
    adjusted = np.empty_like(p_N)
    stepped = p_N[order] * (len(p_N) - np.arange(len(p_N)))
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return adjusted


def verdict(
    difference: Interval, p_holm: float, *, num_contrasts: int, inert: bool, at_equal_kl: Interval | None = None
) -> str:
    """The verdict on a contrast in words: higher, lower, within noise, too few seeds, or an inert reference.

    A higher headline is a gain, and a lower one a loss, only if the difference at equal KL has the same direction.
    """
    if difference.n < 2:
        return "one seed: no verdict" if difference.n else "no common seed"
    if inert:
        return "the reference was inert"
    if p_holm < LEVEL:
        direction = "higher" if difference.value > 0 else "lower"
        return direction + _caveat(direction, at_equal_kl)
    clear = difference.low > 0 or difference.high < 0
    if clear and smallest_p(difference.n) * num_contrasts > LEVEL:
        return "too few seeds to tell"
    return "within noise"


def _caveat(direction: str, at_equal_kl: Interval | None) -> str:
    """What the difference at equal KL adds to a verdict; empty if it has the same direction or was not measured."""
    if at_equal_kl is None or at_equal_kl.n == 0:
        return ""
    if at_equal_kl.n < 2:
        return ", at equal KL not known"
    if at_equal_kl.low <= 0 <= at_equal_kl.high:
        return ", at equal KL within noise"
    there = "higher" if at_equal_kl.value > 0 else "lower"
    return "" if there == direction else f", at equal KL {there}"
