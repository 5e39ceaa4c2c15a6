"""Ranks: the only file that knows torchrun and the rank environment.

A run of one rank is done in the process that asks for it; a run of several is done by children of torchrun that
read the resolved configuration of the run folder, as does a job of a cluster: `python -m sdpo.launch RUN/config.yaml`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdpo import config as configuration
from sdpo.config import Config

CHECKOUT = Path(__file__).parents[1]
PARENT = "SDPO_PARENT"  # the port on which a rank's parent listens as long as it lives


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def device(name: str = "auto"):
    """The torch device of this rank; `auto` is its GPU where there is one. ValueError where cuda is absent."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("launch.device=cuda, but PyTorch finds no GPU; use launch.device=cpu or auto")
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
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)


def run(config: Config, folder: Path) -> dict:
    """Do the run that `folder` was prepared for, with as many ranks as it asks for; returns its summary."""
    if config.launch.ranks == 1:
        return _work(config, folder)
    _start_ranks(config, folder)
    return json.loads((folder / "summary.json").read_text())


def _work(config: Config, folder: Path) -> dict:
    """This rank's part of a run."""
    set_threads(config.launch.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    import torch

    from sdpo import runs, stepwise

    torch.use_deterministic_algorithms(True)
    _join(config)
    try:
        summary = stepwise.run(config, folder)
        if is_main():
            runs.finish(config, folder)
        return summary
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _join(config: Config) -> None:
    """Join the process group; DeepSpeed wants one even for a single rank."""
    if config.launch.ranks == 1 and config.deepspeed.stage is None:
        return
    import torch
    import torch.distributed as dist

    place = device(config.launch.device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    store = dist.HashStore() if world_size() == 1 else None  # None: torchrun's own
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size())


def _start_ranks(config: Config, folder: Path) -> None:
    """Run torchrun to its end. ValueError with the first failing rank's error where it fails."""
    from sdpo import runs

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command = [
        *torchrun,
        f"--nproc-per-node={config.launch.ranks}",
        "-m",
        "sdpo.launch",
        folder / "config.yaml",
    ]
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    with socket.create_server(("127.0.0.1", 0)) as alive, (folder / "log.txt").open("w") as log:
        env = {**os.environ, "PYTHONPATH": path, PARENT: str(alive.getsockname()[1])}
        env["OMP_NUM_THREADS"] = str(config.launch.threads)
        agent = subprocess.Popen(command, env=env, stderr=log, start_new_session=True)
        try:
            code = agent.wait()
        finally:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
                agent.wait()
    if code:
        raise ValueError(
            runs.failure(folder) or f"the ranks ended with code {code}; see {folder / 'log.txt'}"
        )


def exit_with_parent(descriptor: int) -> None:
    """End this process as soon as the other end of `descriptor` closes, however its owner died."""

    def watch():
        with suppress(ConnectionError):
            os.read(descriptor, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """One rank under torchrun, or a whole run where there is none."""
    from sdpo import runs

    path = Path(sys.argv[1])
    try:
        config = configuration.load(path)
        if "RANK" not in os.environ:
            run(config, path.parent)
            return
        exit_with_parent(socket.create_connection(("127.0.0.1", int(os.environ[PARENT]))).detach())
        if is_main():
            os.dup2(1, 2)  # the terminal; standard error is the log of torchrun and the other ranks
        _work(config, path.parent)
    except Exception as error:
        runs.fail(path.parent, error)
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    main()
