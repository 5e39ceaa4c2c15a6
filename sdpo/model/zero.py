"""The engine on DeepSpeed ZeRO 1 to 3. This is the only file that imports deepspeed."""

import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn

from sdpo import config, distributed
from sdpo.errors import UserError
from sdpo.model.hub import DTYPES, cast
from sdpo.model.logprobs import Scorer
from sdpo.model.parameters import adamw, round_parts, temporarily_add, trained_parameters, writers

# Keys of DeepSpeed that are not given in deepspeed.config, and what decides them.
BATCHES = "optim.pairs_per_update and launch.tokens_per_pack decide it"
PRECISION = "precision decides it; gradients of micro-batches are summed in fp32"
OPTIMISER = "the optimiser is AdamW, with the settings of optim"
OFFLOAD = "deepspeed.offload decides it"
OWNED = {
    "train_batch_size": BATCHES,
    "train_micro_batch_size_per_gpu": BATCHES,
    "gradient_accumulation_steps": BATCHES,
    "gradient_clipping": "optim.clip decides it",
    "optimizer": OPTIMISER,
    "scheduler": OPTIMISER,
    "zero_allow_untested_optimizer": OPTIMISER,
    "zero_force_ds_cpu_optimizer": OPTIMISER,
    "fp16": PRECISION,
    "bf16": PRECISION,
    "bfloat16": PRECISION,
    "amp": PRECISION,
    "torch_autocast": PRECISION,
    "data_types": PRECISION,
    "zero_optimization.stage": "deepspeed.stage decides it",
    "zero_optimization.cpu_offload": OFFLOAD,
    "zero_optimization.cpu_offload_param": OFFLOAD,
    "zero_optimization.compute_grad_norm": "the gradient's norm is logged",
}


class Zero:
    """DeepSpeed ZeRO: the ranks share optimiser state (stage 1), gradients (2) and parameters (3).

    Attributes and methods are described in Plain.
    """

    def __init__(
        self,
        scorer: Scorer,
        optim: config.Optim,
        precision: str,
        device: torch.device,
        settings: config.Deepspeed,
    ):
        if device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        # PyTorch 2.13 renamed what DeepSpeed still calls.
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
        # On a CPU, DeepSpeed would compile this extension, which only inference needs, at its first use. A rank that is
        # killed during the compilation leaves a lock behind, and the next run waits for it forever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.stage: int | None = settings.stage
        trained = trained_parameters(scorer)
        # DeepSpeed makes its masters from the bf16 cast: they are replaced by the fp32 weights that were loaded.
        exact = {name: p.detach() for name, p in trained.items() if p.dtype != DTYPES[precision] == torch.bfloat16}
        deepspeed_config = _zero_config(optim, precision, settings)
        _check_names(deepspeed_config["zero_optimization"])
        if settings.stage == 3:
            deepspeed.zero.Init(module=_InTurn(scorer, device, DTYPES[precision]), config_dict_or_path=deepspeed_config)
        self.module, wrapped, _, _ = deepspeed.initialize(
            model=cast(scorer, device, DTYPES[precision]),
            optimizer=adamw(list(trained.values()), optim) if trained else None,
            config=deepspeed_config,
        )
        self.scorer, self.part, self.num_parts = scorer, distributed.rank(), distributed.world_size()
        self.trains, self.states = bool(trained), optim.states
        if trained:
            self.zero, self.optimizer = wrapped, wrapped.optimizer
        self.module.training = scorer.training  # the wrapper's own train() and eval() do not set this flag
        if exact:
            self.set_weights(exact)

    def renew(self, optim: config.Optim) -> None:
        self.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            group |= {"lr": optim.lr, "betas": tuple(optim.betas), "weight_decay": optim.weight_decay}
        self.zero.clip_grad = optim.clip

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(loss * distributed.world_size())  # DeepSpeed takes the mean over ranks, we want the sum
        if not last:
            self.module.step()

    def update(self, lr: float) -> torch.Tensor:
        for group in self.module.optimizer.param_groups:
            group["lr"] = lr
        self.module.step()
        return torch.as_tensor(self.module.get_global_grad_norm())

    def weights(self, everywhere: bool = False) -> dict[str, torch.Tensor]:
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        full, trained = {}, trained_parameters(self.scorer)
        for name, param in (trained or dict(self.scorer.named_parameters())).items():
            with deepspeed.zero.GatheredParameters([param], enabled=not trained):
                tensor = safe_get_full_fp32_param(param) if trained else param.detach().float()
                if everywhere or distributed.is_main():
                    full[name] = tensor.to("cpu", copy=True)
        return full

    def share(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        params, share = trained_parameters(self.scorer), {}
        for name, rank in writers(params).items():
            whole = safe_get_full_fp32_param(params[name])  # every rank takes part, and one keeps it
            if rank == distributed.rank():
                share[name] = whole.to(dtype).to("cpu", copy=True)
        return share

    def set_weights(self, weights: dict[str, torch.Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        params: dict[str, Any] = trained_parameters(self.scorer)  # DeepSpeed adds attributes to them
        for name, param in params.items():
            tensor = weights[name].to(param.device)
            if self.stage != 3:
                safe_set_full_fp32_param(param, tensor)
            else:  # the call above does not expect that all shares have one size, the last ones padded
                size = param.ds_tensor.numel()
                padded = nn.functional.pad(tensor.flatten(), (0, distributed.world_size() * size - tensor.numel()))
                safe_set_local_fp32_param(param, padded.split(size)[distributed.rank()])
        self.refresh()

    def deltas_added(self, deltas: dict[str, torch.Tensor]) -> AbstractContextManager:
        import deepspeed

        gathered = partial(deepspeed.zero.GatheredParameters, modifier_rank=0, enabled=self.stage == 3)
        return temporarily_add(self.scorer, deltas, gathered)

    @property
    def sums(self) -> list[torch.Tensor]:
        """DeepSpeed also keeps the bucket in which it reduces gradients, and at stage 1 whole gradients."""
        params = list(trained_parameters(self.scorer).values())
        bucket = params[0].detach().new_zeros(()).expand(self.zero.reduce_bucket_size)
        num_buckets = 1 + self.zero.overlap_comm if self.zero.contiguous_gradients else 0
        return [*self.parts, *[bucket] * num_buckets, *(params if self.stage == 1 else [])]

    @property
    def parts(self) -> list[torch.Tensor]:
        if self.stage == 3:  # its optimiser has parameters only during a step
            return self.zero.fp32_partitioned_groups_flat
        return [part for group in self.optimizer.param_groups for part in group["params"]]

    @property
    def numels(self) -> list[int]:
        """The sizes of what the ranks divide, in the order of `parts`; see sdpo.model.checkpoints.redivision."""
        if self.stage != 3:
            return [sum(param.numel() for param in trained_parameters(self.scorer).values())]
        return [param.ds_numel for group in self.zero.fp16_groups for param in group]

    @torch.no_grad()
    def round_to(self, dtype: torch.dtype) -> None:
        round_parts(self.parts, dtype)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        from deepspeed.utils import safe_get_local_fp32_param

        if self.stage != 3:
            self.zero.update_lp_params()
            return
        params: dict[str, Any] = trained_parameters(self.scorer)
        for param in params.values():
            param.partition()  # small parameters stay whole after an update
            param.ds_tensor.copy_(safe_get_local_fp32_param(param))

    def close(self) -> None:
        from deepspeed.runtime.zero import parameter_offload

        self.module.destroy()
        parameter_offload.FWD_MODULE_STACK.clear()  # DeepSpeed never removes the scorer from this global list
        # At stage 3, a pass without gradients after one with gradients leaves references that the garbage collector
        # does not see, so all tensors are taken away from what they lead to.
        for param in self.scorer.parameters():
            vars(param).clear()  # DeepSpeed's attributes, among them the rank's share
            param.data = param.data.new_empty(0)
        for owner in (self.module.optimizer, self.module, self):
            vars(owner).clear()
        gc.collect()


class _InTurn(nn.Module):
    """A scorer whose parameters are moved and cast just before DeepSpeed divides them, so that only one is whole."""

    def __init__(self, scorer: Scorer, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.scorer, self.device, self.dtype = scorer, device, dtype

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for param in self.scorer.parameters():
            param.data = param.data.to(self.device, self.dtype, copy=True)
            yield param


def check_settings(settings: config.Deepspeed) -> None:
    """Raise UserError if deepspeed.config has a key that another setting of ours decides, or that cannot work here."""
    given = settings.config
    if given and settings.stage is None:
        raise UserError("deepspeed.config is not read with deepspeed=off: choose a stage, or leave it out")
    zero = given.get("zero_optimization") or {}
    for key, instead in OWNED.items():
        section, _, name = key.rpartition(".")
        if name in (zero if section else given):
            raise UserError(f"deepspeed.config.{key} cannot be set, because {instead}")
    for name in ("offload_optimizer", "offload_param"):
        if name in zero and not settings.offload:
            raise UserError(f"deepspeed.config.zero_optimization.{name} needs deepspeed.offload=true")
        if (zero.get(name) or {}).get("device", "cpu") != "cpu":
            raise UserError(
                f"deepspeed.config.zero_optimization.{name}.device can be cpu alone: checkpoints and references read "
                "masters and weights where they are, which DeepSpeed does not allow for those on NVMe"
            )


def _zero_config(optim: config.Optim, precision: str, settings: config.Deepspeed) -> dict[str, Any]:
    """All of DeepSpeed's settings: the given ones, under ours."""
    zero: dict[str, Any] = {"stage": settings.stage}
    if settings.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if settings.stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    ours = {
        "train_micro_batch_size_per_gpu": 1,  # we cut micro-batches by tokens; DeepSpeed only counts calls
        "gradient_clipping": optim.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    return _merged(settings.config, ours)


def _check_names(zero: dict[str, Any]) -> None:
    """Raise UserError if DeepSpeed does not know one of these settings, or refuses its value."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**zero)
    except ValueError as error:
        raise UserError(f"deepspeed.config.zero_optimization: {' '.join(str(error).split())}") from error


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one; `above` decides where both have a value."""
    inner = {
        key: _merged(below[key], above[key]) for key in below.keys() & above.keys() if isinstance(below[key], dict)
    }
    return below | above | inner
