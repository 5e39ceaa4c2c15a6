"""Statistics over seeds: Student-t intervals, paired differences, exact sign-flip tests, Holm's correction.

A seed is the unit: arms of one seed share S, pairs and evaluation prompts, so they are compared seed by seed.
"""

from collections.abc import Sequence
from math import nan

import numpy as np
import pandas as pd
from scipy import stats

from sdpo.errors import UserError
from sdpo.stats import Interval, student

LEVEL = 0.05  # of the verdicts, after Holm's correction
INERT = 0.02  # mean change of a pair's weight below which a reference did nothing
EXACT_SEEDS = 20  # 2^20 sign flips take 10 MB and a few milliseconds


def by_group(frame: pd.DataFrame, keys: list[str], column: str) -> pd.DataFrame:
    """`student` of `column` for each group of `keys`, as they appear: keys, value, low, high, seeds."""
    rows = [(*key, *student(group[column])) for key, group in frame.groupby(keys, sort=False, dropna=False)]
    return pd.DataFrame(rows, columns=[*keys, "value", "low", "high", "seeds"])


def paired(first: pd.Series, second: pd.Series) -> np.ndarray:
    """first - second on the seeds (index) that both have; `UserError` where a seed stands twice."""
    for side in (first, second):
        if side.index.has_duplicates:
            twice = sorted(set(side.index[side.index.duplicated()]))
            raise UserError(f"an arm has two runs with seed {twice[0]}; give folders in which it runs once")
    return (first - second).dropna().to_numpy()


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of a mean as far from 0, when each difference's sign is a fair coin.

    All 2^n sign patterns up to 20 differences, 100,000 drawn ones beyond; nan without a difference.
    """
    differences = np.asarray(differences, dtype=float)
    if len(differences) == 0:
        return nan
    if len(differences) > EXACT_SEEDS:
        drawn = stats.permutation_test(
            (differences,), np.mean, permutation_type="samples", vectorized=True, n_resamples=99_999, rng=0
        )
        return float(drawn.pvalue)
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    rounding = 1e-12 * np.abs(differences).sum()
    return float(np.mean(np.abs(sums) >= abs(differences.sum()) - rounding))


def smallest_p(num_seeds: int) -> float:
    """The smallest p that `sign_flip` can give with so many seeds: 2 of 2^n patterns."""
    return 2.0 ** (1 - num_seeds)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's adjusted p-values: family-wise error over the declared contrasts; nan stays nan and counts."""
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values)  # nan last
    adjusted = np.empty_like(p_values)
    stepped = p_values[order] * (len(p_values) - np.arange(len(p_values)))
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return adjusted


def verdict(
    difference: Interval, p_holm: float, *, num_contrasts: int, inert: bool, at_equal_kl: Interval | None = None
) -> str:
    """What a contrast says in words: higher, lower, within noise, too few seeds, or an inert reference.

    What is higher or lower is a gain or a loss only where it is so at equal KL, too.
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
    """What a reader of a verdict must know besides; nothing where the difference at equal KL has its direction."""
    if at_equal_kl is None or at_equal_kl.n == 0:
        return ""
    if at_equal_kl.n < 2:
        return ", at equal KL not known"
    if at_equal_kl.low <= 0 <= at_equal_kl.high:
        return ", at equal KL within noise"
    there = "higher" if at_equal_kl.value > 0 else "lower"
    return "" if there == direction else f", at equal KL {there}"
