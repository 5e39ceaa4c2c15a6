"""What a model prefers on held-out pairs, pair by pair."""

import numpy as np

from sdpo.stats import Measure, mean, share, share_above
from sdpo.types import Scored

# The measures that each source and each further set of pairs has.
BY_SOURCE = ("ranking_accuracy", "reward_accuracy_initial", "gamma", "shorter_accuracy")


def columns(scored: Scored) -> dict[str, np.ndarray]:
    """The measures of every pair [N], by name."""
    policy, unknown = scored.policy, np.full_like(scored.policy, np.nan)
    reference, initial = (unknown if logps is None else logps for logps in (scored.reference, scored.initial))
    gamma, ratio = policy[:, 0] - policy[:, 1], policy - initial
    found = {
        "gamma_ref": reference[:, 0] - reference[:, 1],
        "ranking_accuracy": share_above(gamma),
        "gamma": gamma,
        "chosen_logp": policy[:, 0],
        "rejected_logp": policy[:, 1],
        "log_ratio_chosen": ratio[:, 0],
        "log_ratio_rejected": ratio[:, 1],
        "shorter_accuracy": share_above(scored.lengths[:, 1] - scored.lengths[:, 0]),
    }
    for name, other in (("step", reference), ("initial", initial)):
        margin = gamma - (other[:, 0] - other[:, 1])
        found |= {f"reward_accuracy_{name}": share_above(margin), f"margin_{name}": margin}
    return found


def mean_of(name: str, values: np.ndarray) -> Measure:
    """The mean of a measure's values [N], with the interval that suits it: Wilson's if they are shares."""
    return (share if "accuracy" in name else mean)(values)
