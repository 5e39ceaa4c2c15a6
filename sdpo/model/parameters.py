"""Helpers of both engines: find the trained parameters, optimise and share them, and change frozen ones for a while."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from sdpo import config, distributed
from sdpo.errors import UserError

# Of bitsandbytes: its moments of smaller tensors are fp32, and these entries of its state are equal for all tensors.
SMALLEST_IN_8BIT, TABLES = 4096, "qmap"
SHARE = 2**28  # bytes in fp32: below it, a second file is not worth its while
LAYER = re.compile(r"(.*?\.\d+)\.")  # the part of a parameter's name that names its layer


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: param for name, param in module.named_parameters() if param.requires_grad}


def without_memory(shape: torch.Size, device: torch.device) -> torch.Tensor:
    """An fp32 tensor that takes no memory and can have a gradient of this shape."""
    return torch.zeros((), device=device).expand(shape)


def step_in_turn(optimizer: torch.optim.Optimizer, masters: list[torch.Tensor], sums: list[torch.Tensor]) -> None:
    """One update of masters on the host by gradients on the device: of one master after the other, to save memory."""
    for master, total in zip(masters, sums, strict=True):
        if total.grad is not None:
            master.grad = torch.empty_like(master, pin_memory=total.is_cuda).copy_(total.grad)
            total.grad = None
            optimizer.step()  # skips masters without a gradient
            master.grad = None


def adamw(params: list[torch.Tensor], optim: config.Optim) -> torch.optim.Optimizer:
    """AdamW, fused: on a CPU this is five times faster than a loop over tensors.

    With `states=8bit` its moments are 8-bit numbers in blocks of 256 that share a scale (Dettmers et al. 2110.02861),
    those of tensors with fewer than 4096 elements fp32. Raises UserError if bitsandbytes is not there.
    """
    beta1, beta2 = optim.betas
    settings: dict[str, Any] = {"lr": optim.lr, "betas": (beta1, beta2), "weight_decay": optim.weight_decay}
    if optim.states != "8bit":
        return torch.optim.AdamW(params, **settings, fused=True)
    if find_spec("bitsandbytes") is None:
        raise UserError("optim.states=8bit needs bitsandbytes: pip install bitsandbytes, or optim.states=host")
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params, **settings)


def moments_of(optimizer: torch.optim.Optimizer, master: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the optimiser keeps for a master, by name; empty before the first update."""
    kept = optimizer.state[master].items()
    return {name: torch.as_tensor(value) for name, value in kept if not name.startswith(TABLES)}


def set_moments(optimizer: torch.optim.Optimizer, master: torch.Tensor, moments: dict[str, torch.Tensor]) -> None:
    """Set what `moments_of` returned."""
    state = {name: tensor.to(master.device) for name, tensor in moments.items()}
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.state[master] = state
        return
    params: list[torch.Tensor] = optimizer.param_groups[0]["params"]
    index = next(i for i, param in enumerate(params) if param is master)
    optimizer.init_state(optimizer.param_groups[0], master, 0, index)  # type: ignore[attr-defined]  # sets the tables
    optimizer.state[master] |= state | {"step": int(state["step"])}


def growth(optimizer: torch.optim.Optimizer, sums: list[torch.Tensor]) -> list[torch.Tensor]:
    """Empty tensors that take as much memory as the first update adds: sums of gradients, and the missing moments."""
    added = [torch.empty(one.shape, dtype=one.dtype, device=one.device) for one in sums]
    for group in optimizer.param_groups:
        for master in group["params"]:
            if not optimizer.state.get(master):
                is_8bit = not isinstance(optimizer, torch.optim.AdamW) and master.numel() >= SMALLEST_IN_8BIT
                added += [torch.empty_like(master, dtype=torch.uint8 if is_8bit else None) for _ in range(2)]
    return added


def round_parts(parts: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Round fp32 tensors in place to what `dtype` can hold."""
    if dtype != torch.float32:
        for part in parts:
            part.copy_(part.to(dtype))


def writers(params: dict[str, nn.Parameter]) -> dict[str, int]:
    """For each parameter the rank that writes it: about equal bytes each, unless the model is small.

    The parameters of a layer stay together, because a file format may have several of them as one tensor.
    """
    sizes = {name: getattr(param, "ds_numel", param.numel()) for name, param in params.items()}  # whole under ZeRO-3
    total, before, ranks = sum(sizes.values()), 0, dict[str, int]()
    num_writers = min(distributed.world_size(), 1 + 4 * total // SHARE)
    for name, size in sizes.items():
        layer = LAYER.match(name)
        ranks.setdefault(layer[1] if layer else name, before * num_writers // total)
        before += size
    return {name: ranks[layer[1] if (layer := LAYER.match(name)) else name] for name in sizes}


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
