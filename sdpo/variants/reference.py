"""Reference rules: which model is the reference of a step, and when it changes.

A rule gets the number of the step (from 1) and of its updates. It returns windows that cover the updates from the
first on. A window has its number of updates, and the weights of its reference as {handle: coefficient}; the
coefficients sum to 1. Handles are `M_0` .. `M_{t-1}` (S and the models of the earlier steps), `policy` (the policy at
the window's start), `reference` (the reference of the previous window) and `external`.
"""

from sdpo.errors import UserError
from sdpo.types import Window


def previous(step: int, num_updates: int) -> list[Window]:
    """sDPO, Kim et al. 2403.19270: the model that the previous step produced."""
    return [Window(num_updates, {f"M_{step - 1}": 1.0})]


def initial(step: int, num_updates: int) -> list[Window]:
    """DPO, Rafailov et al. 2305.18290: S in every step. In stepwise training, the control with a fixed reference."""
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
    """Another model, as in Table 1 of Kim et al. 2403.19270.

    The code that loads the model reads the keywords: its path and revision, its prompt template, and its number of
    parameters, which a plan uses if the model is not on this machine.
    """
    return [Window(num_updates, {"external": 1.0})]


def periodic(step: int, num_updates: int, *, updates: int) -> list[Window]:
    """TR-DPO hard, Gorbatovski et al. 2404.09656: a copy of the policy, replaced after every `updates` updates."""
    return [Window(length, {"policy": 1.0}) for length in _lengths(num_updates, updates)]


def mixed(step: int, num_updates: int, *, alpha: float, updates: int) -> list[Window]:
    """TR-DPO soft, Gorbatovski et al. 2404.09656: the policy at the step's start, and after every `updates` updates
    (1 - alpha) * reference + alpha * policy. With alpha 1 it is `periodic`. Raises UserError unless 0 < alpha <= 1.
    """
    if not 0 < alpha <= 1:
        raise UserError(f"reference.alpha must be above 0 and at most 1, not {alpha}")
    first, *later = _lengths(num_updates, updates)
    weights = {"reference": 1 - alpha, "policy": alpha} if alpha < 1 else {"policy": 1.0}
    return [Window(first, {"policy": 1.0})] + [Window(length, weights) for length in later]


def until_kl(step: int, num_updates: int, *, bound: float) -> list[Window]:
    """A copy of the policy, replaced after every update whose pairs lie further than `bound` from it.

    The distance is `kl_proxy` of sdpo/train/loop.py, in nats per token: half the squared log-ratio of the update's own
    responses, before the update. It is no KL on samples, but costs nothing. Raises UserError unless bound > 0.
    """
    if not bound > 0:
        raise UserError(f"reference.bound must be above 0, not {bound}")
    return [Window(num_updates, {"policy": 1.0}, bound)]


def average(step: int, num_updates: int) -> list[Window]:
    """The mean of the weights of S and of the models of all earlier steps; in the first step it is S."""
    return [Window(num_updates, {f"M_{i}": 1 / step for i in range(step)})]


def none(step: int, num_updates: int) -> list[Window]:
    """No window and no forward pass, for losses that read no reference (sft, simpo, cpo, orpo)."""
    return []


def _lengths(num_updates: int, updates: int) -> list[int]:
    """Cut `num_updates` into windows of `updates`; the last one may be shorter."""
    if updates < 1:
        raise UserError(f"reference.updates must be at least 1, not {updates}")
    assert num_updates >= 1
    return [min(updates, num_updates - start) for start in range(0, num_updates, updates)]
