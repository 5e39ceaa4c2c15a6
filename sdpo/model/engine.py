"""Plain PyTorch or DeepSpeed ZeRO 1-3 behind the same verbs: forward, backward, update, weights, set_weights,
shifted.

A checkpoint reads and sets `parts`, the fp32 masters of this rank's optimiser, and calls `refresh` after it. An engine
whose parameters are all frozen has no masters and no optimiser: it scores, in the memory of the weights alone.

Masters are fp32 whenever parameters are bf16: at DPO's learning rates a bf16 weight would hardly ever move. Gradients
are sums over an update's micro-batches, so the caller divides the loss by the update's pairs over all ranks.
This is the only file that imports deepspeed.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import nn

from sdpo import config, distributed
from sdpo.errors import UserError
from sdpo.model.hub import DTYPES, cast


def adamw(params: list[torch.Tensor], optim: config.Optim) -> torch.optim.AdamW:
    """The one optimiser, fused (on CPU five times faster than the loop over tensors)."""
    return torch.optim.AdamW(params, lr=optim.lr, betas=tuple(optim.betas), weight_decay=optim.weight_decay, fused=True)


class Plain:
    """Every rank holds the whole model; gradients are summed over ranks once per update."""

    stage = None
    part = 0  # all ranks have the same part of masters and optimiser state: the whole

    def __init__(self, scorer: nn.Module, optim: config.Optim, precision: str, device: torch.device):
        self.scorer, self.module, self.clip = scorer, scorer, optim.clip or math.inf
        self.params = self.masters = _trained(scorer)
        if precision != "fp32":
            self.masters = {name: p.detach().to(device, torch.float32, copy=True) for name, p in self.params.items()}
        cast(scorer, device, DTYPES[precision])
        if precision != "fp32":
            for name, param in self.params.items():
                param.register_post_accumulate_grad_hook(_accumulate_in(self.masters[name]))
        self.optimizer = adamw(list(self.masters.values()), optim) if self.masters else None

    def forward(self, pack):
        return self.scorer(pack)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def update(self, lr: float) -> torch.Tensor:
        """One optimiser update with the gradients so far; returns their norm before clipping."""
        masters = list(self.masters.values())
        if distributed.world_size() > 1:
            for master in masters:
                torch.distributed.all_reduce(master.grad)
        norm = nn.utils.clip_grad_norm_(masters, self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.refresh()
        return norm

    def weights(self, everywhere: bool = False) -> dict[str, torch.Tensor]:
        """A copy of the full fp32 weights that are trained on the host, by parameter name; of all where none is."""
        full = self.masters or dict(self.scorer.named_parameters())
        return {name: weight.detach().to("cpu", torch.float32, copy=True) for name, weight in full.items()}

    @torch.no_grad()
    def set_weights(self, weights: dict[str, torch.Tensor]) -> None:
        for name, master in self.masters.items():
            master.copy_(weights[name])
        self.refresh()

    def shifted(self, deltas: dict[str, torch.Tensor]) -> AbstractContextManager:
        """Within it these frozen parameters are larger by these amounts."""
        return _shifted(self.scorer, deltas, _as_they_are)

    @property
    def parts(self) -> list[torch.Tensor]:
        return list(self.masters.values())

    @torch.no_grad()
    def refresh(self) -> None:
        """Let the forward pass read the masters."""
        if self.masters is not self.params:
            for name, param in self.params.items():
                param.copy_(self.masters[name])

    def close(self) -> None:
        """Nothing to release: the next engine's memory comes from the garbage collector."""


def _trained(scorer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param for name, param in scorer.named_parameters() if param.requires_grad}


@contextmanager
def _shifted(scorer: nn.Module, deltas: dict[str, torch.Tensor], whole: Callable) -> Iterator[None]:
    """Add to parameters, then give them back the bits that they had, which meanwhile lie on the host; `whole` is a
    context in which parameters are not divided over ranks."""
    params, kept = dict(scorer.named_parameters()), {}
    for name, delta in deltas.items():
        with torch.no_grad(), whole([params[name]]):
            kept[name] = params[name].to("cpu", copy=True)
            params[name].copy_(params[name].float() + delta.to(params[name].device))
    yield
    for name, tensor in kept.items():
        with torch.no_grad(), whole([params[name]]):
            params[name].copy_(tensor)


def _as_they_are(params: list[torch.Tensor]) -> AbstractContextManager:
    return nullcontext()


def _accumulate_in(master: torch.Tensor):
    """A hook that adds a parameter's fresh gradient to its master's in fp32 and frees it."""

    def hook(param: torch.Tensor) -> None:
        master.grad = param.grad.float() if master.grad is None else master.grad.add_(param.grad)
        param.grad = None

    return hook


class Zero:
    """DeepSpeed ZeRO: optimiser state (1), gradients (2) and parameters (3) divided over the ranks."""

    def __init__(
        self,
        scorer: nn.Module,
        optim: config.Optim,
        precision: str,
        device: torch.device,
        settings: config.Deepspeed,
    ):
        if device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # renamed in 2.13; DeepSpeed's to mend
        # Compiled at first use on CPU, for inference alone; a rank killed meanwhile leaves a lock that hangs the next.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.stage = settings.stage
        trained = _trained(scorer)
        exact = {name: p.detach().clone() for name, p in trained.items()} if precision == "bf16" else None
        self.module, wrapped, _, _ = deepspeed.initialize(
            model=scorer,
            optimizer=adamw(list(trained.values()), optim) if trained else None,
            config=_zero_config(optim, precision, settings),
        )
        self.scorer, self.part = scorer, distributed.rank()
        if trained:
            self.zero, self.optimizer = wrapped, wrapped.optimizer
        self.module.training = scorer.training  # its own train() and eval() leave this alone
        if exact:  # DeepSpeed builds its masters from the bf16 cast; ours are the bits that were saved
            self.set_weights(exact)

    def forward(self, pack):
        return self.module(pack)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(loss * distributed.world_size())  # DeepSpeed averages over ranks; ours are sums
        if not last:
            self.module.step()

    def update(self, lr: float) -> torch.Tensor:
        for group in self.module.optimizer.param_groups:
            group["lr"] = lr
        self.module.step()
        return torch.as_tensor(self.module.get_global_grad_norm())

    def weights(self, everywhere: bool = False) -> dict[str, torch.Tensor]:
        """Full fp32 weights on the host as Plain's, gathered one by one; of rank 0 alone unless `everywhere`."""
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        full, trained = {}, _trained(self.scorer)
        for name, param in (trained or dict(self.scorer.named_parameters())).items():
            with deepspeed.zero.GatheredParameters([param], enabled=not trained):
                tensor = safe_get_full_fp32_param(param) if trained else param.detach().float()
                if everywhere or distributed.is_main():
                    full[name] = tensor.to("cpu", copy=True)
        return full

    def set_weights(self, weights: dict[str, torch.Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        for name, param in _trained(self.scorer).items():
            tensor = weights[name].to(param.device)
            if self.stage < 3:
                safe_set_full_fp32_param(param, tensor)
            else:  # all ranks have shares of one size, the last ones padded, which the call above does not expect
                size = param.ds_tensor.numel()
                padded = nn.functional.pad(tensor.flatten(), (0, distributed.world_size() * size - tensor.numel()))
                safe_set_local_fp32_param(param, padded.split(size)[distributed.rank()])
        self.refresh()

    def shifted(self, deltas: dict[str, torch.Tensor]) -> AbstractContextManager:
        """As Plain's."""
        import deepspeed

        whole = partial(deepspeed.zero.GatheredParameters, modifier_rank=0, enabled=self.stage == 3)
        return _shifted(self.scorer, deltas, whole)

    @property
    def parts(self) -> list[torch.Tensor]:
        if self.stage == 3:  # its optimiser has parameters only while it steps
            return self.zero.fp32_partitioned_groups_flat
        return [part for group in self.optimizer.param_groups for part in group["params"]]

    @torch.no_grad()
    def refresh(self) -> None:
        """Let the forward pass read the masters: setting them is not enough, DeepSpeed copies them after an update."""
        from deepspeed.utils import safe_get_local_fp32_param

        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for param in _trained(self.scorer).values():
            param.partition()  # small parameters stay whole after an update
            param.ds_tensor.copy_(safe_get_local_fp32_param(param))

    def close(self) -> None:
        self.module.destroy()


def _zero_config(optim: config.Optim, precision: str, settings: config.Deepspeed) -> dict:
    zero = {"stage": settings.stage}
    if settings.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if settings.stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # our micro-batches are cut by tokens; DeepSpeed only counts calls
        "gradient_clipping": optim.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
    }


Engine = Plain | Zero


def open_engine(
    scorer: nn.Module, optim: config.Optim, precision: str, deepspeed: config.Deepspeed, device: torch.device
) -> Engine:
    """The engine that the settings ask for, with masters equal to the scorer's fp32 weights.

    To score alone, ZeRO 1 and 2 have nothing to divide, and are plain. Raises UserError for bf16 on a processor
    without bf16 arithmetic, where it is 50 times slower than fp32.
    """
    has_bf16 = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if precision == "bf16" and not has_bf16:
        raise UserError("precision=bf16: this processor has neither avx512_bf16 nor AMX; use precision=fp32")
    if deepspeed.stage is None or (deepspeed.stage < 3 and not _trained(scorer)):
        return Plain(scorer, optim, precision, device)
    return Zero(scorer, optim, precision, device, deepspeed)
