"""Placebo references: the stored reference log-probs with a part of what they know taken away.

A placebo asks what helps in a better reference: the height of its bound, or what it knows of each pair.
Arrays are [N, 2], log-probs of the chosen and the rejected response under S (`initial_N2`) and under the
model that the reference rule named (`rule_N2`); the result takes the place of `rule_N2` in the loss.

Shape suffixes: N pairs of a window, 2 chosen and rejected.
"""

import numpy as np


def none(initial_N2: np.ndarray, rule_N2: np.ndarray, seed: int) -> np.ndarray:
    """The rule's log-probs as they are."""
    return rule_N2


def mean_shift(initial_N2: np.ndarray, rule_N2: np.ndarray, seed: int) -> np.ndarray:
    """S's log-probs plus the mean shift to the rule's: the same mean gamma, nothing of the single pair."""
    return initial_N2 + (rule_N2 - initial_N2).mean(axis=0, keepdims=True, dtype=np.float64).astype(rule_N2.dtype)


def permute(initial_N2: np.ndarray, rule_N2: np.ndarray, seed: int) -> np.ndarray:
    """S's log-probs plus the rule's shifts, each given to another pair, along a random circle."""
    circle_N = np.random.default_rng(seed).permutation(len(rule_N2))
    permuted_N2 = initial_N2.copy()
    permuted_N2[circle_N] += (rule_N2 - initial_N2)[np.roll(circle_N, 1)]
    return permuted_N2
