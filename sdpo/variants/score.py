"""Scores: one number per pair [N]; a higher number means an easier pair.

The positional parameters name the data that a score reads. These are arrays [N, 2] of the chosen and the rejected
response: `logps`, summed log-probs (nats) under the model that `score.model` names; `base_logps`, the same under the
model at `path`; `rewards` of a reward model; `ratings` of a judge, nan if missing; and `lengths` in tokens. Three
are different: `prompt_lengths` [N], in tokens; `pair_scores` [N], numbers that came with the pairs; and `margins`
[N, models], under models that were not trained on the pair.
A keyword that a function here does not use is read by the code that computes the data.

An accuracy is the share of scores above 0. The paper (Kim et al. 2403.19270 v2) sorts sources by reward accuracy and
does not say which definition it used, so here the definition is a choice, and split.json names it.
"""

import numpy as np

from sdpo.errors import UserError


def gamma(logps: np.ndarray) -> np.ndarray:
    """log pi(chosen) - log pi(rejected), summed over tokens: the paper's gamma. It measures mostly length."""
    return logps[:, 0] - logps[:, 1]


def gamma_per_token(logps: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """gamma of the mean log-probs per token, which depends less on length."""
    mean = logps / lengths
    return mean[:, 0] - mean[:, 1]


def implicit_reward(logps: np.ndarray, base_logps: np.ndarray, *, path: str, revision: str | None = None) -> np.ndarray:
    """gamma - gamma_base: the gap of DPO's implicit rewards (Rafailov et al. 2305.18290, eq. 5) at beta 1. The
    reference is the model at `path`, before fine-tuning.
    """
    return gamma(logps) - gamma(base_logps)


def reward_model(
    rewards: np.ndarray, *, path: str, revision: str | None = None, template: str | None = None
) -> np.ndarray:
    """The gap of the rewards of the sequence classifier at `path`."""
    return rewards[:, 0] - rewards[:, 1]


def rating_gap(ratings: np.ndarray) -> np.ndarray:
    """The gap of the ratings in the data (Curri-DPO, 2403.07230). Raises UserError if a rating is missing."""
    missing = int(np.isnan(ratings).any(axis=1).sum())
    if missing:
        raise UserError(
            f"score=rating_gap needs chosen_rating and rejected_rating, which {missing} of {len(ratings)} training "
            "pairs lack; choose another score, or data with ratings"
        )
    return ratings[:, 0] - ratings[:, 1]


def column(pair_scores: np.ndarray, *, file: str | None = None) -> np.ndarray:
    """The number that came with each pair, in the data's column `pair_score` or in that of a `file` with ids."""
    return pair_scores


def length_gap(lengths: np.ndarray) -> np.ndarray:
    """Tokens by which the chosen response is shorter. Such pairs are easy for summed log-probs, which tend to prefer
    the shorter response.
    """
    return lengths[:, 1] - lengths[:, 0]


def prompt_length(prompt_lengths: np.ndarray) -> np.ndarray:
    """Minus the prompt's tokens: a shorter prompt is easier. Never above 0, so sources need `measure=mean`."""
    return -prompt_lengths


def validation_loss(margins: np.ndarray, *, repeats: int = 3, beta: float = 0.1, seed: int = 0) -> np.ndarray:
    """Minus the mean DPO loss under models that were trained on the half of the data without the pair (Selective DPO,
    Gao et al. 2502.09650). Never above 0, so sources need `measure=mean`.
    """
    return -np.logaddexp(0, -beta * margins).mean(axis=1)
