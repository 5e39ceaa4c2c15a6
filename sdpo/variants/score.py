"""Scores: one number per pair, higher is easier, from what the positional parameters name.

What a score may read, arrays over pairs with columns chosen and rejected unless said otherwise:
`logps`, summed response log-probs (nats) under the model that `score.model` names, and `base_logps`, under the
one at `path`; `rewards`, a reward model's; `ratings`, a judge's, nan where missing; `lengths`, response tokens;
`prompt_lengths`, tokens, one per pair; `margins`, of models that were not trained on the pair, one column each.
Keywords that no line here reads say how the data are made.

An accuracy is the share of scores above 0. The paper (2403.19270 v2) sorts sources by reward accuracy without
saying which reading of it was used, so the reading is a named choice here, and is named in split.json.
"""

import numpy as np

from sdpo.errors import UserError


def gamma(logps: np.ndarray) -> np.ndarray:
    """log pi(chosen) - log pi(rejected), summed over tokens: what the paper's gamma is. Mostly measures length."""
    return logps[:, 0] - logps[:, 1]


def gamma_per_token(logps: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """gamma of the mean log-probs per token, which length alone does not decide."""
    mean = logps / lengths
    return mean[:, 0] - mean[:, 1]


def implicit_reward(logps: np.ndarray, base_logps: np.ndarray, *, path: str, revision: str | None = None) -> np.ndarray:
    """gamma - gamma_base: the gap of DPO's implicit rewards (Rafailov et al. 2305.18290, eq. 5) at beta 1, with
    the model before fine-tuning at `path` as reference.
    """
    return gamma(logps) - gamma(base_logps)


def reward_model(
    rewards: np.ndarray, *, path: str, revision: str | None = None, template: str | None = None
) -> np.ndarray:
    """The gap of the rewards that the sequence classifier at `path` gives."""
    return rewards[:, 0] - rewards[:, 1]


def rating_gap(ratings: np.ndarray) -> np.ndarray:
    """The gap of the ratings that came with the pair (Curri-DPO, 2403.07230). UserError where one is missing."""
    missing = int(np.isnan(ratings).any(axis=1).sum())
    if missing:
        raise UserError(
            f"score=rating_gap needs chosen_rating and rejected_rating, which {missing} of {len(ratings)} training "
            "pairs lack; choose another score, or data with ratings"
        )
    return ratings[:, 0] - ratings[:, 1]


def length_gap(lengths: np.ndarray) -> np.ndarray:
    """Tokens by which the chosen response is shorter: easy for whoever takes the shorter one, as summed
    log-probs tend to.
    """
    return lengths[:, 1] - lengths[:, 0]


def prompt_length(prompt_lengths: np.ndarray) -> np.ndarray:
    """Minus the prompt's tokens: shorter is easier. Never above 0, so sources need `measure=mean`."""
    return -prompt_lengths


def validation_loss(margins: np.ndarray, *, repeats: int = 3, beta: float = 0.1, seed: int = 0) -> np.ndarray:
    """Minus the mean DPO loss under models trained on halves of the data without the pair (Selective DPO, Gao
    et al. 2502.09650). Never above 0, so sources need `measure=mean`.
    """
    return -np.logaddexp(0, -beta * margins).mean(axis=1)
