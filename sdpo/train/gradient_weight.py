"""lambda: the weight of a pair in the gradient of the loss.

For DPO it is sigmoid(beta * (gamma_ref - gamma_theta)) (Rafailov et al. 2305.18290, section 4). Here it is computed
from the loss function itself, for every loss with a reference: the derivative of the pair's loss by the log-prob of its
rejected response, divided by beta.

Shape suffixes: B pairs of a micro-batch, N pairs of a chunk; columns are the chosen and the rejected response.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from sdpo.binding import inputs_of
from sdpo.types import ChosenRejected


def of_batch(loss: Callable[[ChosenRejected], torch.Tensor], policy: ChosenRejected, beta: float) -> torch.Tensor:
    """lambda [B] of a micro-batch; `loss` maps the policy's log-probs to one loss per pair [B].

    It differentiates at a detached copy of the log-probs: DeepSpeed would take a backward pass through the policy's own
    graph for the update's.
    """
    copy = ChosenRejected(*(logps_B.detach().requires_grad_() for logps_B in policy))
    with torch.enable_grad():
        loss_B = loss(copy)
    (slope_B,) = torch.autograd.grad(loss_B, copy.rejected, torch.ones_like(loss_B), materialize_grads=True)
    return slope_B / beta


def of_pairs(loss: partial, **data_N2: np.ndarray) -> np.ndarray | None:
    """lambda [N] of some pairs; None if the loss reads no reference, has no beta, or reads what is not stored.

    `data_N2` holds what a loss may read, each [N, 2], by the names of the loss's parameters.
    """
    inputs = inputs_of(loss)
    if "reference" not in inputs or "beta" not in loss.keywords or not set(inputs) <= data_N2.keys():
        return None
    data = {name: ChosenRejected(*torch.from_numpy(values_N2).float().unbind(1)) for name, values_N2 in data_N2.items()}

    def loss_of(policy: ChosenRejected) -> torch.Tensor:
        return loss(*((data | {"policy": policy})[name] for name in inputs))

    return of_batch(loss_of, data["policy"], loss.keywords["beta"]).numpy()
