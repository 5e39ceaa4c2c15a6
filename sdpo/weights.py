"""lambda, the weight of a pair in a loss's gradient: what one nat of its rejected response's log-prob counts.

Derived from the loss itself, whatever it is; for DPO it is sigmoid(beta * (gamma_ref - gamma_theta)).

Shape suffixes: B pairs of a micro-batch, N pairs of a chunk; columns are the chosen and the rejected response.
"""

from collections.abc import Callable

import numpy as np
import torch

from sdpo.config import needs
from sdpo.losses import Both


def lambdas(loss_B: torch.Tensor, policy: Both, beta: float) -> torch.Tensor:
    """The derivative [B] of each pair's loss by its `policy.rejected`, in units of beta; its graph is kept."""
    ones_B = torch.ones_like(loss_B)
    (slope_B,) = torch.autograd.grad(loss_B, policy.rejected, ones_B, retain_graph=True, materialize_grads=True)
    return slope_B / beta


def of_pairs(loss: Callable, **data_N2: np.ndarray) -> np.ndarray | None:
    """lambda [N] of some pairs; `data_N2` is what a loss may read, by name. None where it has no reference or beta."""
    if "reference" not in needs(loss) or "beta" not in loss.keywords:
        return None
    data = {name: Both(*torch.from_numpy(values_N2).float().unbind(1)) for name, values_N2 in data_N2.items()}
    policy = Both(*(logps_N.requires_grad_() for logps_N in data.pop("policy")))
    loss_N = loss(*(policy if name == "policy" else data[name] for name in needs(loss)))
    return lambdas(loss_N, policy, loss.keywords["beta"]).numpy()
