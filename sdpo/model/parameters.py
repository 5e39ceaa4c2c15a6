"""Helpers of both engines: find the trained parameters, optimise them, and change frozen ones for a while."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from sdpo import config


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: param for name, param in module.named_parameters() if param.requires_grad}


def adamw(params: list[torch.Tensor], optim: config.Optim) -> torch.optim.AdamW:
    """The only optimiser, fused: on a CPU this is five times faster than a loop over tensors."""
    beta1, beta2 = optim.betas
    return torch.optim.AdamW(params, lr=optim.lr, betas=(beta1, beta2), weight_decay=optim.weight_decay, fused=True)


@contextmanager
def temporarily_add(
    module: nn.Module,
    deltas: dict[str, torch.Tensor],
    gathered: Callable[[list[torch.Tensor]], AbstractContextManager],
) -> Iterator[None]:
    """Context in which `deltas` are added to parameters; at its end they get back their old bits, kept on the host.

    `gathered` makes a context in which the given parameters are whole on this rank, not divided over the ranks.
    """
    params, kept = dict(module.named_parameters()), {}
    for name, delta in deltas.items():
        with torch.no_grad(), gathered([params[name]]):
            kept[name] = params[name].to("cpu", copy=True)
            params[name].copy_(params[name].float() + delta.to(params[name].device))
    yield
    for name, tensor in kept.items():
        with torch.no_grad(), gathered([params[name]]):
            params[name].copy_(tensor)
