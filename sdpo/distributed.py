"""Ranks: their number, their device, the values that they exchange, and how they are asked to stop."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdpo.errors import UserError

if TYPE_CHECKING:
    import torch  # imported by the functions that need it: it takes seconds

SHARES = "SDPO_SHARES_GPU"  # environment variable: set if a sweep may start other runs on this run's GPU
STOPPED = 85  # the exit code of a rank that was asked to stop and has saved what it had
STOPS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)  # what asks a run to stop
SHARING = "SDPO_SHARING"  # environment variable: the file with the number of runs that share this run's GPUs
_stops: list[int] = []  # the signals that asked this process to stop
_background: list[Any] = []  # the second process group, if it was joined
# torch.cuda.is_available() then asks the driver (NVML) and does not start CUDA, which forked runs could not use.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
# Packs differ in size: blocks of fixed sizes would leave up to a sixth of a GPU's memory in pieces too small for any.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


class _OfThread(threading.local):
    group: Any = None  # the process group in which this thread exchanges values; None: the default one


_of_thread = _OfThread()


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of ranks."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Return whether this is rank 0, which writes files and talks to the user."""
    return rank() == 0


def device(name: str = "auto") -> "torch.device":
    """Return the device of this rank; `auto` is its GPU if there is one. Raises UserError if cuda is not available."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("launch.device=cuda, but PyTorch finds no GPU; use launch.device=cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def runs_on_gpu() -> int | None:
    """Return how many of a sweep's runs used this run's GPUs at once, at most, so far; None without a sweep on GPUs."""
    file = os.environ.get(SHARING)
    return int(Path(file).read_text()) if file else None


def shares_device() -> bool:
    """Return whether a sweep may start other runs on this rank's GPU; it places runs by the memory of their plans."""
    return SHARES in os.environ


def join_background_group(timeout: timedelta) -> None:
    """Join a second process group, in which threads exchange values while the main threads do so in the first."""
    import torch.distributed as dist

    _background[:] = [dist.new_group(backend="gloo", timeout=timeout)]


def leave_groups() -> None:
    """Leave all process groups, and keep none in memory."""
    import torch.distributed as dist

    _background.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def go_to_background() -> None:
    """Let this thread exchange values in the second process group, if there is one."""
    _of_thread.group = _background[0] if _background else None


def barrier() -> None:
    """Wait for all ranks. PyTorch's own barrier allocates on the GPU, and threads must not call it (PyTorch 2.11)."""
    gather(None)


def broadcast(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    if world_size() == 1:
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, group=_of_thread.group)
    return box[0]


def gather(value: Any) -> list:
    """Return the values of all ranks, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, _of_thread.group)
    return values


def gather_results(work: Callable[[], Any]) -> list:
    """Return what `work` returns on every rank, in the order of ranks. An error of one rank is raised on all."""
    value = failure = None
    try:
        value = work()
    except Exception as error:  # whatever it is, it is raised below, here and on all other ranks
        failure = error
    found = gather((value, failure))
    for raised in (failure, *(error for _, error in found)):
        if raised:
            raise raised
    return [value for value, _ in found]


def gather_numbered(share: dict[int, Any]) -> list:
    """Return the values that the ranks hold by their numbers from 0, in the order of numbers, on every rank."""
    values = {number: value for part in gather(share) for number, value in part.items()}
    return [values[number] for number in range(len(values))]


def total(tensor: "torch.Tensor") -> "torch.Tensor":
    """Sum a tensor over the ranks, in place and on every rank."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor)
    return tensor


def stop_requested() -> bool:
    """Return whether this process was asked to stop, inside `stops_deferred`."""
    return bool(_stops)


@contextmanager
def stops_deferred() -> Iterator[None]:
    """Context in which SIGTERM, SIGUSR2 and SIGHUP do not end the process, so that it can save its work and end itself.

    A signal that is ignored (as SIGHUP under nohup) stays so; a thread other than the main one cannot defer signals.
    """
    _stops.clear()
    is_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in STOPS if is_main_thread}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, lambda number, _frame: _stops.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def set_threads(threads: int) -> None:
    """Set the threads of the numerical libraries; some of them only read it when they are imported."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # pyarrow's: a sweep must fork from one thread
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)
