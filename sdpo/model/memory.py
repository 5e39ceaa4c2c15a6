"""Making a step fit in memory: its heaviest micro-batch is tried before the first update, and cut until it fits.

Without a try, running out of memory is the sentence that names the budget to set.
"""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import ref

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from sdpo import distributed
from sdpo.config import Launch
from sdpo.console import tell
from sdpo.errors import UserError
from sdpo.model.engine import Engine
from sdpo.model.packing import micro_batches, pack, tokens_of
from sdpo.types import TokenPair

SIGNS = ("out of memory", "DefaultCPUAllocator", "bad_alloc", "ALLOC_FAILED")  # what allocators say


def fitting_budget(engine: Engine, updates: list[list[TokenPair]], launch: Launch) -> int:
    """The token budget, at most the configured one, at which the heaviest micro-batch of these updates fits.

    It is halved on all ranks together; a pair that does not fit alone has its activations recomputed instead. Where
    that is not enough either, a UserError. Under ZeRO-3, whose ranks meet inside a forward pass, nothing is tried.
    """
    budget, recomputed = launch.tokens_per_pack, launch.recompute_activations
    if recomputed:
        recompute_activations(engine.scorer.model)
    can_run_out = any(distributed.gather(_can_run_out(distributed.device(launch.device))))
    if not can_run_out or engine.stage == 3:
        return budget
    while not _fits(engine, heaviest := _heaviest(updates, budget)):
        if len(heaviest) > 1:
            budget //= 2
        elif not recomputed:
            recompute_activations(engine.scorer.model)
            recomputed = True
        else:
            raise UserError(
                f"pair {heaviest[0].id} ({tokens_of(heaviest[0])} tokens) does not fit in memory even alone and with "
                "its activations recomputed: lower data.max_tokens, or use tune=lora, deepspeed=zero3 or precision=bf16"
            )
    if (budget, recomputed) != (launch.tokens_per_pack, launch.recompute_activations):
        values = f"launch.tokens_per_pack={budget} launch.recompute_activations={str(recomputed).lower()}"
        tell(f"the heaviest micro-batch did not fit in memory; it does with {values}, which spares the search")
    return budget


def recompute_activations(model: nn.Module) -> None:
    """Keep only what enters a layer, and compute the layer again in the backward pass; gradients stay the same.

    Raises UserError, with the model's name, where it does not say what its layers are.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"{type(model).__name__} has no layers to recompute: lower launch.tokens_per_pack instead")
    for layer in layers:
        layer.forward = _recomputing(layer)


def _recomputing(layer: nn.Module) -> Callable:
    """A layer's forward pass that is done twice; by weak reference, so that no layer outlives its engine."""
    forward, owner = type(layer).forward, ref(layer)
    return lambda *args, **kwargs: checkpoint(forward, owner(), *args, use_reentrant=False, **kwargs)


@contextmanager
def explained(doing: str, budget: int) -> Iterator[None]:
    """Within it, running out of memory is a UserError that says what to set."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _ran_out(error):
            raise
        raise UserError(
            f"out of memory {doing}: set launch.tokens_per_pack={max(1, budget // 2)}, or "
            "launch.recompute_activations=true; the same command then goes on from the last checkpoint"
        ) from error


def _ran_out(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in SIGNS)


def _can_run_out(device: torch.device) -> bool:
    """Whether an allocation can fail; on the CPU a process without a limit on its address space is killed instead."""
    return device.type == "cuda" or resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def _heaviest(updates: list[list[TokenPair]], budget: int) -> list[TokenPair]:
    """The pairs of the micro-batch with the most tokens, over all updates and ranks."""
    cut = (
        [rows[i] for i in members]
        for rows in updates
        for packs in micro_batches(rows, budget, distributed.world_size())
        for members in packs
    )
    return max(cut, key=lambda rows: sum(map(tokens_of, rows)))


def _fits(engine: Engine, rows: list[TokenPair]) -> bool:
    """Whether every rank has room for a micro-batch."""
    try:
        _try(engine, rows)
        fits = True
    except (RuntimeError, MemoryError) as error:
        if not _ran_out(error):
            raise
        fits = False
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return all(distributed.gather(fits))


def _try(engine: Engine, rows: list[TokenPair]) -> None:
    """Forward and backward pass beside what the first update adds: gradients, and moments where there are none.

    Gradients are returned, not accumulated: the engine's hooks, in which ranks meet, do not see them.
    """
    optimizer, trained = engine.optimizer, [p for p in engine.scorer.parameters() if p.requires_grad]
    added = [
        torch.empty_like(param)
        for group in optimizer.param_groups
        for param in group["params"]
        for _ in range(1 if optimizer.state.get(param) else 3)
    ]
    policy = engine.scorer(pack(rows).to(trained[0].device))
    torch.autograd.grad(torch.stack(policy).sum(), trained, allow_unused=True)
    del added
