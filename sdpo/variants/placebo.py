"""Placebo references: reference log-probs from which a part of the information was removed.

A placebo answers why a better reference helps: because of its mean gamma, or because of its values for single pairs.
`initial_N2` has the summed log-probs (nats) of the responses under S, `rule_N2` those under the model that the
reference rule names. The loss reads the result instead of `rule_N2`.

Shape suffixes: N pairs of a window, 2 chosen and rejected.
"""

import numpy as np


def none(initial_N2: np.ndarray, rule_N2: np.ndarray, seed: int) -> np.ndarray:
    """Return the rule's log-probs unchanged."""
    return rule_N2


def mean_shift(initial_N2: np.ndarray, rule_N2: np.ndarray, seed: int) -> np.ndarray:
    """Return S's log-probs plus the mean of the rule's shifts: the mean gamma of the rule, the single pairs of S."""
    return initial_N2 + (rule_N2 - initial_N2).mean(axis=0, keepdims=True, dtype=np.float64).astype(rule_N2.dtype)


def permute(initial_N2: np.ndarray, rule_N2: np.ndarray, seed: int) -> np.ndarray:
    """Return S's log-probs plus the rule's shifts from S, each shift added to another pair (one random cycle)."""
    cycle_N = np.random.default_rng(seed).permutation(len(rule_N2))
    permuted_N2 = initial_N2.copy()
    permuted_N2[cycle_N] += (rule_N2 - initial_N2)[np.roll(cycle_N, 1)]
    return permuted_N2
