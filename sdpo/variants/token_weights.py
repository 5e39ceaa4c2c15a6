"""Weights of response tokens, for losses that do not count all tokens alike: one function per such loss, of its name.

The policy's and the reference's log-prob of a response are then sums over its tokens of weight * log-prob, and the loss
itself is a function of these sums. A function gets the numbers of tokens of the chosen and the rejected response and a
seed of the pair's own. It returns the weights of both. Its keyword-only parameters are settings of the loss.

Shape suffixes: C tokens of the chosen response, R tokens of the rejected one.
"""

import numpy as np

Weights = tuple[np.ndarray, np.ndarray]  # weights_C, weights_R


def sampo(num_chosen: int, num_rejected: int, seed: list[int]) -> Weights:
    """1 for as many tokens of the longer response, drawn without replacement, as the shorter one has; 0 for the others.

    SamPO, Lu et al. 2406.10957.
    """
    common = min(num_chosen, num_rejected)
    return _drawn(num_chosen, common, seed), _drawn(num_rejected, common, seed)


def ld_dpo(num_chosen: int, num_rejected: int, seed: list[int], *, alpha: float) -> Weights:
    """1 for as many tokens as the shorter response has, from the first on; `alpha` for those behind them.

    LD-DPO, Liu et al. 2409.06411.
    """
    common = min(num_chosen, num_rejected)
    return _discounted(num_chosen, common, alpha), _discounted(num_rejected, common, alpha)


def _drawn(num: int, num_drawn: int, seed: list[int]) -> np.ndarray:
    weights = np.ones(num, dtype=np.float32)
    if num_drawn < num:
        weights[np.random.default_rng(seed).choice(num, num - num_drawn, replace=False)] = 0
    return weights


def _discounted(num: int, num_whole: int, alpha: float) -> np.ndarray:
    return np.where(np.arange(num) < num_whole, 1, alpha).astype(np.float32)
