"""The engine: one scorer on its device, with the optimiser that trains it. With all parameters frozen it only scores.

There are two kinds, Plain and Zero, with the same attributes and methods; Plain describes them.

Masters are the fp32 weights that the optimiser changes. With precision=fp32 they are the parameters themselves; with
bf16 they are kept beside the parameters, because at DPO's learning rates a bf16 weight would hardly ever move. With
optim.states=host they and the moments are in host memory, where the optimiser runs.

Gradients are summed over the micro-batches of an update and over the ranks, so the caller divides the loss by the
number of pairs of the update on all ranks.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from sdpo import config, distributed
from sdpo.errors import UserError
from sdpo.model.hub import DTYPES, cast
from sdpo.model.logprobs import Scorer
from sdpo.model.parameters import (
    adamw,
    round_parts,
    step_in_turn,
    temporarily_add,
    trained_parameters,
    without_memory,
    writers,
)
from sdpo.model.zero import Zero


class Plain:
    """Plain PyTorch: every rank holds the whole model; gradients are summed over ranks once per update.

    `module` is the scorer, or DeepSpeed's wrapper of it. It is called with a pack, and with a frozen scorer if one runs
    beside. `stage` is the ZeRO stage. `part` says which part of the masters this rank has, of `num_parts`; ranks with
    the same number have the same part. `sums` have the gradients of the present update: the masters, or tensors on the
    device that stand for them. If all parameters are frozen there is no `optimizer`, so that memory holds only the
    weights, and `trains` is False.
    """

    def __init__(self, scorer: Scorer, optim: config.Optim, precision: str, device: torch.device):
        self.scorer = scorer
        self.module: nn.Module = scorer
        self.stage: int | None = None
        self.part, self.num_parts = 0, 1
        self.params = trained_parameters(scorer)
        self.trains, self.states = bool(self.params), optim.states
        self.masters: dict[str, torch.Tensor] = dict(self.params)
        self.on_host = optim.states == "host"
        self.is_mixed = precision != "fp32" or self.on_host
        home = torch.device("cpu") if self.on_host else device
        for name, param in self.params.items() if self.is_mixed else ():
            self.masters[name] = param.detach().to(home).to(torch.float32, copy=True)
            if not self.on_host:  # the weights cross to the device once
                param.data = self.masters[name].to(DTYPES[precision])
        cast(scorer, device, DTYPES[precision])
        self.sums = self.parts
        if self.on_host:
            self.sums = [without_memory(param.shape, device) for param in self.params.values()]
        if self.is_mixed:
            for param, total in zip(self.params.values(), self.sums, strict=True):
                param.register_post_accumulate_grad_hook(_accumulate_in(total))
        if self.masters:
            self.renew(optim)

    def renew(self, optim: config.Optim) -> None:
        """Begin anew from the present weights, with an optimiser that knows nothing of earlier updates or settings."""
        self.clip = optim.clip or math.inf
        self.optimizer: torch.optim.Optimizer = adamw(self.parts, optim)

    @property
    def parts(self) -> list[torch.Tensor]:
        """The masters that this rank has. Whoever changes them calls `refresh` afterwards."""
        return list(self.masters.values())

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradients of one micro-batch; `last` tells that it is the last one of its update."""
        loss.backward()

    def update(self, lr: float) -> torch.Tensor:
        """Take one optimiser step with the gradients so far; returns their norm before clipping."""
        if distributed.world_size() > 1:
            self._sum_over_ranks()
        norm = nn.utils.clip_grad_norm_(self.sums, self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.on_host:
            step_in_turn(self.optimizer, self.parts, self.sums)
        else:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.refresh()
        return norm

    def _sum_over_ranks(self) -> None:
        """Sum the gradients over ranks. What no rank used, such as a vision tower, keeps none."""
        used = torch.tensor([total.grad is not None for total in self.sums], device=self.sums[0].device)
        for total, num_ranks in zip(self.sums, distributed.total(used.int()).tolist(), strict=True):
            if num_ranks:
                total.grad = torch.zeros_like(total) if total.grad is None else total.grad
                torch.distributed.all_reduce(total.grad)

    def weights(self, everywhere: bool = False) -> dict[str, torch.Tensor]:
        """A copy of the trained weights (of all weights if none is trained): whole, fp32, on the host, by name.

        Only rank 0 gets them unless `everywhere` is set.
        """
        if not (everywhere or distributed.is_main()):
            return {}
        full = self.masters or dict(self.scorer.named_parameters())
        return {name: weight.detach().to("cpu", torch.float32, copy=True) for name, weight in full.items()}

    def share(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """This rank's share of the trained weights in `dtype`, by name; no copy of those that have it already.

        The shares of all ranks together are all trained weights.
        """
        mine = [name for name, rank in writers(self.params).items() if rank == distributed.rank()]
        held = self.params if next(iter(self.params.values())).dtype == dtype else self.masters
        return {name: held[name].detach().to(dtype) for name in mine}

    @torch.no_grad()
    def set_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Set the trained weights, given as `weights` returns them."""
        for name, master in self.masters.items():
            master.copy_(weights[name])
        self.refresh()

    def deltas_added(self, deltas: dict[str, torch.Tensor]) -> AbstractContextManager:
        """Context in which `deltas` are added to frozen parameters; at its end they are bit for bit as before."""
        return temporarily_add(self.scorer, deltas, lambda _params: nullcontext())

    @torch.no_grad()
    def round_to(self, dtype: torch.dtype) -> None:
        """Round the trained weights to the values that a file of this dtype can hold."""
        round_parts(self.parts, dtype)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the masters to the parameters that the forward pass reads."""
        if self.is_mixed:
            for name, param in self.params.items():
                param.copy_(self.masters[name].to(param.device))  # then the device rounds, not one thread of the host

    def close(self) -> None:
        """Release what the garbage collector does not: here nothing."""


def _accumulate_in(total: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """A hook that adds a parameter's new gradient to the gradient of `total` in fp32, and frees it."""

    def hook(param: torch.Tensor) -> None:
        assert param.grad is not None
        total.grad = param.grad.float() if total.grad is None else total.grad.add_(param.grad)
        param.grad = None

    return hook


Engine = Plain | Zero


def has_bf16(device: torch.device) -> bool:
    """Whether a device has bf16 arithmetic: a GPU of 2020 (Ampere) or later, or a processor with avx512_bf16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def open_engine(
    scorer: Scorer, optim: config.Optim, precision: str, deepspeed: config.Deepspeed, device: torch.device
) -> Engine:
    """The engine for these settings; its masters equal the scorer's fp32 weights.

    With all parameters frozen, ZeRO 1 and 2 have nothing to divide, and the engine is Plain. Raises UserError for bf16
    on a device without bf16 arithmetic: on such a processor bf16 is 50 times slower than fp32.
    """
    if precision == "bf16" and not has_bf16(device):
        lack = "processor has neither avx512_bf16 nor AMX" if device.type == "cpu" else "GPU has no bf16 arithmetic"
        raise UserError(f"precision=bf16: this {lack}; use precision=fp32")
    if deepspeed.stage is None or (deepspeed.stage < 3 and not trained_parameters(scorer)):
        return Plain(scorer, optim, precision, device)
    return Zero(scorer, optim, precision, device, deepspeed)
