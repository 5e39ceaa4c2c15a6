"""Makes a step fit in memory: before the first update, its heaviest micro-batch is tried and cut until it fits.

If no trial was run, running out of memory becomes an error that names the budget to set.
"""

import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from sdpo import distributed
from sdpo.config import SCORED, TRAINED, Launch
from sdpo.console import tell
from sdpo.errors import UserError
from sdpo.model.engine import Engine
from sdpo.model.layers import recompute_activations
from sdpo.model.logprobs import Scorer
from sdpo.model.packing import micro_batches, pack, tokens_of
from sdpo.model.parameters import growth, trained_parameters
from sdpo.types import TokenPair

# Parts of the messages of allocators, and of the errors that a run makes of them.
OF_MEMORY = ("out of memory", "DefaultCPUAllocator", "bad_alloc", "ALLOC_FAILED", "MemoryError", "fit in memory")


def scoring_budget(launch: Launch) -> int:
    """The token budget of passes without gradients."""
    return launch.tokens_per_pack or SCORED[_kind(launch)]


def fitting_budget(engine: Engine, updates: list[list[TokenPair]], launch: Launch, beside: Scorer | None = None) -> int:
    """The token budget of training, halved until the heaviest micro-batch of these updates fits in memory.

    `beside` is the reference, if it is in memory, too. All ranks halve the budget together. If a single pair does not
    fit, activations are recomputed from then on; raises UserError if the pair does not fit even so. No trial is run
    under ZeRO-3, whose ranks wait for each other inside a forward pass, nor on CPUs without a memory limit.
    """
    device, recomputed = distributed.device(launch.device), launch.recompute_activations
    if recomputed:
        recompute_activations(engine.scorer.model)
    can_run_out = any(distributed.gather(_can_run_out(device)))
    if not can_run_out or engine.stage == 3:
        return launch.tokens_per_pack or TRAINED["cpu"]
    first = budget = launch.tokens_per_pack or TRAINED[_kind(launch)]
    while not _fits(engine, heaviest := _heaviest(updates, budget), beside):
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
    if (budget, recomputed) != (first, launch.recompute_activations):
        values = f"launch.tokens_per_pack={budget} launch.recompute_activations={str(recomputed).lower()}"
        tell(f"the heaviest micro-batch did not fit in memory; it fits with {values}: set these to skip this search")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # the trial's peak is not that of training
    return budget


@contextmanager
def explained(doing: str, budget: int) -> Iterator[None]:
    """Context in which running out of memory becomes a UserError that says what to set; `doing` says when it was."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise UserError(
            f"out of memory {doing}: set launch.tokens_per_pack={max(1, budget // 2)}, or "
            "launch.recompute_activations=true; the same command then continues from the last checkpoint"
        ) from error


def ran_out(error: Exception) -> bool:
    """Whether an error says that memory ran out."""
    return isinstance(error, MemoryError) or tells_of_memory(str(error))


def tells_of_memory(message: str) -> bool:
    """Whether a message says that memory ran out."""
    return any(part in message for part in OF_MEMORY)


def _kind(launch: Launch) -> str:
    """The type of the device; runs that share a GPU have the packs of a CPU, for which the plan counts memory."""
    return "cpu" if distributed.shares_device() else distributed.device(launch.device).type


def _can_run_out(device: torch.device) -> bool:
    """Whether an allocation can fail. On a CPU without a limit on the address space, the process is killed instead."""
    return device.type == "cuda" or resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def _heaviest(updates: list[list[TokenPair]], budget: int) -> list[TokenPair]:
    """The pairs of the micro-batch with the most tokens, over all updates and ranks."""
    batches = (
        [rows[i] for i in members]
        for rows in updates
        for packs in micro_batches(rows, budget, distributed.world_size())
        for members in packs
    )
    return max(batches, key=lambda rows: sum(map(tokens_of, rows)))


def _fits(engine: Engine, rows: list[TokenPair], beside: Scorer | None) -> bool:
    """Whether the micro-batch fits in the memory of every rank."""
    try:
        _run_once(engine, rows, beside)
        fits = True
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        fits = False
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return all(distributed.gather(fits))


def _run_once(engine: Engine, rows: list[TokenPair], beside: Scorer | None) -> None:
    """One forward and backward pass, while as much memory is taken as the first update adds.

    `autograd.grad` returns the gradients instead of accumulating them, so that the engine's hooks, in which ranks wait
    for each other, do not run. Each gradient is freed at once: its sum is part of what the update adds.
    """
    trained = list(trained_parameters(engine.scorer).values())
    update_memory = growth(engine.optimizer, engine.sums)
    found = engine.scorer(pack(rows).to(trained[0].device), beside)
    values = [*found[0], *found[1]] if beside else found
    with ExitStack() as hooks:
        for param in trained:
            hooks.enter_context(param.register_hook(lambda grad: grad.new_zeros(()).expand(grad.shape)))
        torch.autograd.grad(torch.stack(values).sum(), trained, allow_unused=True)
    del update_memory
