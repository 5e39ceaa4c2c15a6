"""Ranks: the only file that knows torchrun and the rank environment.

A run of one rank is done in the process that asks for it. A run of several is done by children of torchrun,
which read the run folder's config.yaml, as a job of a cluster does: `python -m sdpo.launch RUN/config.yaml`.
"""

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sdpo import config
from sdpo.config import Config
from sdpo.distributed import device, is_main, rank, set_threads, world_size
from sdpo.errors import UserError
from sdpo.run import folder as run_folder

CHECKOUT = Path(__file__).parents[2]
PARENT = "SDPO_PARENT"  # the port on which a rank's parent listens as long as it lives


def refuse_ranks() -> None:
    """UserError where this process is itself a rank of torchrun, deepspeed or mpirun."""
    given = [name for name in ("RANK", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK") if name in os.environ]
    given += [argument for argument in sys.argv if argument.startswith("--local")]
    if given:
        raise UserError(
            f"train.py starts its own ranks, but {given[0]} says that it is one: "
            "run it plainly, with launch.ranks=8 for eight GPUs, not under torchrun, deepspeed or mpirun"
        )


def run(settings: Config, folder: Path) -> dict:
    """Do the run that `folder` was prepared for, with as many ranks as it asks for; returns its summary.

    What it raises also stands in the folder's error.txt.
    """
    try:
        with _alone(folder):
            if not run_folder.Run(settings, folder, choices={}, arm="").finished:  # by the process that was waited for
                (folder / "error.txt").unlink(missing_ok=True)  # what that one failed of
                (_work if settings.launch.ranks == 1 else _start_ranks)(settings, folder)
        return json.loads((folder / "summary.json").read_text())
    except Exception as error:
        run_folder.fail(folder, error)
        raise


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process does this run meanwhile: a sweep that is started anew submits the jobs that still run, too."""
    with (folder / run_folder.LOCK).open("w") as file:
        if run_folder.is_taken(file):
            print(f"another process does the run in {folder}; waiting for it to end", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _work(settings: Config, folder: Path) -> None:
    """This rank's part of a run."""
    set_threads(settings.launch.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    if device(settings.launch.device).type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving a model asks DeepSpeed, which would look for a GPU
    import torch

    from sdpo import stepwise

    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms would import inductor: seconds
    torch.utils.deterministic.fill_uninitialized_memory = False  # helps to find errors, at a tenth of a small step
    _join(settings)
    try:
        stepwise.run(settings, folder)
        if is_main():
            run_folder.finish(settings, folder)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _join(settings: Config) -> None:
    """Join the process group; DeepSpeed wants one even for a single rank."""
    if settings.launch.ranks == 1 and settings.deepspeed.stage is None:
        return
    import torch
    import torch.distributed as dist

    place = device(settings.launch.device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    store = dist.HashStore() if world_size() == 1 else None  # None: torchrun's own
    os.environ.setdefault("LOCAL_RANK", "0")  # torchrun sets it, and DeepSpeed asks a single rank for it too
    ranks = {"store": store, "rank": rank(), "world_size": world_size()}
    if place.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=place, **ranks)
    else:
        dist.init_process_group("gloo", **ranks)


def job(folder: Path) -> list[str]:
    """The command that does the run of a prepared folder, on this or another machine."""
    return ["env", f"PYTHONPATH={_python_path()}", sys.executable, "-m", "sdpo.launch", str(folder / "config.yaml")]


def _start_ranks(settings: Config, folder: Path) -> None:
    """Run torchrun to its end. UserError with the error of the first rank that failed."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    script = ["-m", "sdpo.launch", str(folder / "config.yaml")]
    with socket.create_server(("127.0.0.1", 0)) as alive, (folder / "log.txt").open("a") as log:
        env = {**os.environ, "PYTHONPATH": _python_path(), PARENT: str(alive.getsockname()[1])}
        env["OMP_NUM_THREADS"] = str(settings.launch.threads)
        command = [*torchrun, f"--nproc-per-node={settings.launch.ranks}", *script]
        agent = subprocess.Popen(command, env=env, stderr=log, start_new_session=True)
        try:
            code = agent.wait()
        finally:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)  # its ranks end with `alive`
                agent.wait()
    if code:
        raise UserError(_cause(folder))


def _cause(folder: Path) -> str:
    """Why ranks failed. Where one was killed the others only report that they lost it, so torchrun is asked first."""
    signals = re.findall(r"Signal \d+ \((\w+)\) received", (folder / "log.txt").read_text())
    if killed := [name for name in signals if name != "SIGTERM"]:  # with SIGTERM torchrun ends the others
        (folder / "error.txt").unlink(missing_ok=True)
        return f"a rank was killed by {killed[0]}; {folder / 'log.txt'} has the details"
    return run_folder.failure(folder) or f"torchrun died; {folder / 'log.txt'} has the details"


def _python_path() -> str:
    """Where children find this package, whatever folder they start in."""
    return os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))


def exit_with_parent(descriptor: int) -> None:
    """End this process as soon as the other end of `descriptor` closes, however its owner died."""

    def watch():
        with suppress(ConnectionError):
            os.read(descriptor, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """A whole run, or one rank of it under torchrun."""
    path = Path(sys.argv[1])
    settings = config.load(path)
    if "RANK" not in os.environ:
        run(settings, path.parent)
        return
    exit_with_parent(socket.create_connection(("127.0.0.1", int(os.environ[PARENT]))).detach())
    if is_main():
        os.dup2(1, 2)  # the terminal; standard error is the log of torchrun and the other ranks
    try:
        _work(settings, path.parent)
    except Exception as error:
        run_folder.fail(path.parent, error)
        sys.exit(1)
