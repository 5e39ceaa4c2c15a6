"""Scores: one number per pair, higher is easier, from what the positional parameters name.

`logps` are summed response log-probs under the model that `score.model` names, `lengths` response tokens; both are
[N, 2], chosen and rejected. The paper (2403.19270 v2) sorts sources by reward accuracy without saying which reading
of it was used, so the reading is a named choice here: an accuracy is the share of scores above 0.
"""

import numpy as np


def gamma(logps: np.ndarray) -> np.ndarray:
    """log pi(chosen) - log pi(rejected), summed over tokens: what the paper's gamma is. Mostly measures length."""
    return logps[:, 0] - logps[:, 1]


def gamma_per_token(logps: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """gamma of the mean log-probs per token, which length alone does not decide."""
    mean = logps / lengths
    return mean[:, 0] - mean[:, 1]
