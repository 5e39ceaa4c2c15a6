"""lambda, the weight of a pair in a loss's gradient: what one nat of its rejected response's log-prob counts.

Derived from the loss itself, whatever it is; for DPO it is sigmoid(beta * (gamma_ref - gamma_theta)).

Shape suffixes: B pairs of a micro-batch, N pairs of a chunk; columns are the chosen and the rejected response.
"""

from collections.abc import Callable

import numpy as np
import torch

from sdpo.binding import inputs_of
from sdpo.types import ChosenRejected


def of_batch(loss: Callable[[ChosenRejected], torch.Tensor], policy: ChosenRejected, beta: float) -> torch.Tensor:
    """The derivative [B] of each pair's loss of the policy by `policy.rejected`, in units of beta.

    Taken at a copy of the log-probs: DeepSpeed takes any pass back through its own for the update's.
    """
    copy = ChosenRejected(*(logps_B.detach().requires_grad_() for logps_B in policy))
    with torch.enable_grad():
        loss_B = loss(copy)
    (slope_B,) = torch.autograd.grad(loss_B, copy.rejected, torch.ones_like(loss_B), materialize_grads=True)
    return slope_B / beta


def of_pairs(loss: Callable, **data_N2: np.ndarray) -> np.ndarray | None:
    """lambda [N] of some pairs; `data_N2` is what a loss may read, by name. None where it has no reference or beta."""
    if "reference" not in inputs_of(loss) or "beta" not in loss.keywords:
        return None
    data = {name: ChosenRejected(*torch.from_numpy(values_N2).float().unbind(1)) for name, values_N2 in data_N2.items()}

    def of_policy(policy: ChosenRejected) -> torch.Tensor:
        return loss(*((data | {"policy": policy})[name] for name in inputs_of(loss)))

    return of_batch(of_policy, data["policy"], loss.keywords["beta"]).numpy()
