"""Reference rules: when a step's reference moves, and which models it is made of.

A rule gets the step (from 1) and its number of updates and returns windows that cover them: how many updates
each lasts and its weights as {handle: coefficient}, which sum to 1. Handles: `M_0` .. `M_{t-1}` (S and what
the steps produced), `policy` (as at the window's start), `reference` (the last window's) and `external`.
Windows count from a step's first update.
"""

from sdpo.errors import UserError
from sdpo.types import Window


def previous(step: int, num_updates: int) -> list[Window]:
    """sDPO, Kim et al. 2403.19270: the model that the last step produced."""
    return [Window(num_updates, {f"M_{step - 1}": 1.0})]


def initial(step: int, num_updates: int) -> list[Window]:
    """DPO, Rafailov et al. 2305.18290: S in every step, the fixed-reference control of stepwise training."""
    return [Window(num_updates, {"M_0": 1.0})]


def external(
    step: int,
    num_updates: int,
    *,
    path: str,
    revision: str | None = None,
    template: str | None = None,
    parameters: float | None = None,
) -> list[Window]:
    """Another model, as in Table 1 of 2403.19270: the keywords say which one, how it reads a prompt and how large
    it is, for whoever resolves the handle.
    """
    return [Window(num_updates, {"external": 1.0})]


def periodic(step: int, num_updates: int, *, updates: int) -> list[Window]:
    """TR-DPO hard, Gorbatovski et al. 2404.09656: the policy itself, anew after every `updates` updates."""
    return [Window(length, {"policy": 1.0}) for length in _lengths(num_updates, updates)]


def mixed(step: int, num_updates: int, *, alpha: float, updates: int) -> list[Window]:
    """TR-DPO soft, Gorbatovski et al. 2404.09656: the policy at the step's start, then after every `updates`
    updates (1 - alpha) * reference + alpha * policy; at alpha 1 `periodic`. UserError unless 0 < alpha <= 1.
    """
    if not 0 < alpha <= 1:
        raise UserError(f"reference.alpha must be above 0 and at most 1, not {alpha}")
    first, *later = _lengths(num_updates, updates)
    weights = {"reference": 1 - alpha, "policy": alpha} if alpha < 1 else {"policy": 1.0}
    return [Window(first, {"policy": 1.0})] + [Window(length, weights) for length in later]


def average(step: int, num_updates: int) -> list[Window]:
    """The mean of the weights of S and of every model since; in the first step it is `previous`."""
    return [Window(num_updates, {f"M_{i}": 1 / step for i in range(step)})]


def none(step: int, num_updates: int) -> list[Window]:
    """No window and no pass: for losses that read no reference (sft, simpo, cpo, orpo)."""
    return []


def _lengths(num_updates: int, updates: int) -> list[int]:
    """Cuts `num_updates` into windows of `updates`, the last one as short as it comes."""
    if updates < 1:
        raise UserError(f"reference.updates must be at least 1, not {updates}")
    assert num_updates >= 1
    return [min(updates, num_updates - begun) for begun in range(0, num_updates, updates)]
