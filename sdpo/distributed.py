"""Ranks: which one this is, what they exchange, and the device that each one computes on."""

import os
import sys
from typing import Any

from sdpo.errors import UserError


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def device(name: str = "auto"):
    """The torch device of this rank; `auto` is its GPU where there is one. UserError where cuda is absent."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("launch.device=cuda, but PyTorch finds no GPU; use launch.device=cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def barrier() -> None:
    if world_size() > 1:
        import torch.distributed as dist

        dist.barrier()


def broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather(value: Any) -> list:
    """The values of all ranks, in their order, on every rank."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def total(tensor):
    """The sum of a tensor over the ranks, on every rank."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor)
    return tensor


def set_threads(threads: int) -> None:
    """Threads of the numerical libraries; exact where it is called before they are imported."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # of pyarrow: a sweep forks from one thread
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)
