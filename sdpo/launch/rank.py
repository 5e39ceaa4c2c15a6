"""One rank's part of a run: its settings, its process group, its parent, and how it ends."""

import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from sdpo import distributed
from sdpo.config import Config, Launch
from sdpo.distributed import STOPPED, STOPS, device, is_main, rank, set_threads, world_size
from sdpo.errors import UserError
from sdpo.run import folder as run_folder

PARENT = "SDPO_PARENT"  # environment variable: the port on which the parent of the ranks listens while it lives
TIMEOUTS = "Timed out waiting|timed out after|Application timeout"  # what gloo and the stores say
LOST = "Connection closed by peer|Connection reset|Broken pipe|remote process exited"  # what gloo and NCCL say
WATCHDOG = "Watchdog caught collective operation timeout"  # what NCCL writes to the log before it kills its rank


def main(config: Config, folder: Path) -> None:
    """Execute one rank under torchrun, and end with code 1 if it fails."""
    exit_at_signals(even_if_ignored=True)  # torchrun's agent ignores them
    follow_parent(socket.create_connection(("127.0.0.1", int(os.environ[PARENT]))).detach())
    if is_main():
        os.dup2(1, 2)  # to the terminal; the standard error of torchrun and the other ranks goes to log.txt
    try:
        execute(config, folder)
    except Exception as error:
        run_folder.fail(folder, error)
        sys.exit(1)


def exit_at_signals(even_if_ignored: bool = False) -> None:
    """Let SIGTERM, SIGUSR2 and SIGHUP end this process with code STOPPED; inside a step it first saves a checkpoint."""

    def leave(*_: object) -> None:
        end_undisturbed()
        sys.exit(STOPPED)

    for number in STOPS:
        if even_if_ignored or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, leave)


def end_undisturbed() -> None:
    """Let SIGTERM, SIGUSR2 and SIGHUP do nothing from now on: a second one would break the end of this process."""
    for number in STOPS:
        signal.signal(number, lambda *_: None)


def execute(config: Config, folder: Path) -> None:
    """This rank's part of a run."""
    set_threads(config.launch.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    if device(config.launch.device).type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving a model asks DeepSpeed, which would look for a GPU
    import torch

    from sdpo import stepwise

    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms would import inductor, in seconds
    # Filling helps to find errors, and costs a tenth of a small step. (mypy cannot see it: torch makes it a property.)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    _join_process_group(config.launch, with_deepspeed=config.deepspeed.stage is not None)
    try:
        with _lost_rank_as_user_error(config.launch):
            stamp = run_folder.stamp(config)  # of the files that the run is about to read
            stepwise.run(config, folder)
        if is_main():
            run_folder.finish(folder, stamp)
    except Exception as error:
        run_folder.fail(folder, error)  # before the group ends: the other ranks will only report a lost connection
        raise
    finally:
        distributed.leave_groups()


@contextmanager
def _lost_rank_as_user_error(launch: Launch) -> Iterator[None]:
    """Turn an error that only says that another rank did not answer, or left, into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if re.search(TIMEOUTS, str(error)):
            raise UserError(late(launch)) from error
        if re.search(LOST, str(error)):
            raise UserError(
                "a rank or its node ended without an error of its own: it was killed, or lost its network; the logs of "
                "all nodes are log*.txt in the run folder; the same command goes on from the last checkpoint"
            ) from error
        raise


def late(launch: Launch) -> str:
    """The sentence for a rank that does not answer."""
    return (
        f"a rank did not answer for {launch.timeout_minutes:g} minutes (launch.timeout_minutes), so the run was ended; "
        "if it was slow and not frozen, set more minutes; the same command goes on from the last checkpoint"
    )


def _join_process_group(launch: Launch, with_deepspeed: bool) -> None:
    """Join the process group; DeepSpeed needs one even for a single rank."""
    if launch.ranks == 1 and not with_deepspeed:
        return
    import torch
    import torch.distributed as dist

    on = device(launch.device)
    is_gpu, timeout = on.type == "cuda", timedelta(minutes=launch.timeout_minutes)
    if is_gpu:
        torch.cuda.set_device(on)
    os.environ.setdefault("LOCAL_RANK", "0")  # torchrun sets it; DeepSpeed reads it for a single rank, too
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if is_gpu else "gloo",
        store=dist.HashStore() if world_size() == 1 else None,  # None: the store of torchrun
        rank=rank(),
        world_size=world_size(),
        device_id=on if is_gpu else None,
        timeout=timeout,
    )
    distributed.join_background_group(timeout)


def follow_parent(descriptor: int) -> None:
    """Watch the parent's end of a pipe or socket in a thread: a byte sends SIGTERM to this process, its end ends it."""

    def watch() -> None:
        with suppress(ConnectionError):
            while os.read(descriptor, 1):
                os.kill(os.getpid(), signal.SIGTERM)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
