"""One run and its ranks: the only file that knows torchrun and the rank environment.

A run of one rank is executed in the process that asks for it. A run of several ranks is executed by children of
torchrun, which read config.yaml in the run folder, as a cluster job does: `python -m sdpo.launch RUN/config.yaml`.
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

from sdpo import config as configuration
from sdpo.config import Config, Launch
from sdpo.distributed import device, is_main, rank, set_threads, world_size
from sdpo.errors import UserError
from sdpo.run import folder as run_folder
from sdpo.run.folder import Run
from sdpo.store import try_lock

CHECKOUT = Path(__file__).parents[2]
PARENT = "SDPO_PARENT"  # environment variable: the port on which the parent of the ranks listens while it lives


def refuse_ranks() -> None:
    """Raise UserError if this process is itself a rank of torchrun, deepspeed or mpirun."""
    given = [name for name in ("RANK", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK") if name in os.environ]
    given += [argument for argument in sys.argv if argument.startswith("--local")]
    if given:
        raise UserError(
            f"train.py starts its own ranks, but {given[0]} says that it is one: "
            "start it without torchrun, deepspeed or mpirun, and set launch.ranks=8 for eight GPUs"
        )


def run(config: Config, folder: Path) -> dict:
    """Execute the run that `folder` was prepared for, on `launch.ranks` ranks. Returns its summary.

    An error is raised, and also written to error.txt in the folder.
    """
    try:
        with _locked(folder):
            if not Run(config, folder, choices={}, arm="").finished:  # another process may have just finished it
                (folder / "error.txt").unlink(missing_ok=True)  # the failure of that process
                (execute_rank if config.launch.ranks == 1 else _start_ranks)(config, folder)
        return json.loads((folder / "summary.json").read_text())
    except Exception as error:
        run_folder.fail(folder, error)
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run. A restarted sweep also submits runs whose old jobs are still being executed."""
    with (folder / run_folder.LOCK).open("w") as file:
        if not try_lock(file):
            print(f"another process executes the run in {folder}; waiting for it to end", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def execute_rank(config: Config, folder: Path) -> None:
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
        stepwise.run(config, folder)
        if is_main():
            run_folder.finish(config, folder)
    except Exception as error:
        run_folder.fail(folder, error)  # before the group ends: the other ranks will only report a lost connection
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _join_process_group(launch: Launch, with_deepspeed: bool) -> None:
    """Join the process group; DeepSpeed needs one even for a single rank."""
    if launch.ranks == 1 and not with_deepspeed:
        return
    import torch
    import torch.distributed as dist

    on = device(launch.device)
    is_gpu = on.type == "cuda"
    if is_gpu:
        torch.cuda.set_device(on)
    os.environ.setdefault("LOCAL_RANK", "0")  # torchrun sets it; DeepSpeed reads it for a single rank, too
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if is_gpu else "gloo",
        store=dist.HashStore() if world_size() == 1 else None,  # None: the store of torchrun
        rank=rank(),
        world_size=world_size(),
        device_id=on if is_gpu else None,
    )


def job(folder: Path) -> list[str]:
    """The command that executes the run of a prepared folder, on this machine or another one."""
    return ["env", f"PYTHONPATH={_python_path()}", sys.executable, "-m", "sdpo.launch", str(folder / "config.yaml")]


def _start_ranks(config: Config, folder: Path) -> None:
    """Execute torchrun until it ends. Raises UserError with the error of the first rank that failed."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    script = ["-m", "sdpo.launch", str(folder / "config.yaml")]
    with socket.create_server(("127.0.0.1", 0)) as alive, (folder / "log.txt").open("a") as log:
        env = {**os.environ, "PYTHONPATH": _python_path(), PARENT: str(alive.getsockname()[1])}
        env["OMP_NUM_THREADS"] = str(config.launch.threads)
        command = [*torchrun, f"--nproc-per-node={config.launch.ranks}", *script]
        agent = subprocess.Popen(command, env=env, stderr=log, start_new_session=True)
        try:
            code = agent.wait()
        finally:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)  # its ranks end when `alive` closes
                agent.wait()
    if code:
        raise UserError(_cause(folder))


def _cause(folder: Path) -> str:
    """Why the ranks failed. If one was killed, the others only report its loss; so torchrun's log is read first."""
    signals = re.findall(r"Signal \d+ \((\w+)\) received", (folder / "log.txt").read_text())
    if killed := [name for name in signals if name != "SIGTERM"]:  # torchrun ends the remaining ranks with SIGTERM
        (folder / "error.txt").unlink(missing_ok=True)
        return f"a rank was killed by {killed[0]}; {folder / 'log.txt'} has the details"
    return run_folder.failure(folder) or f"torchrun died; {folder / 'log.txt'} has the details"


def _python_path() -> str:
    """The PYTHONPATH with which children find this package from any working directory."""
    return os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))


def exit_with_parent(descriptor: int) -> None:
    """Watch the other end of `descriptor` in a thread, and end this process as soon as the parent that owns it ends."""

    def watch() -> None:
        with suppress(ConnectionError):
            os.read(descriptor, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Execute a whole run or, under torchrun, one rank of it."""
    path = Path(sys.argv[1])
    config = configuration.load(path)
    if "RANK" not in os.environ:
        run(config, path.parent)
        return
    exit_with_parent(socket.create_connection(("127.0.0.1", int(os.environ[PARENT]))).detach())
    if is_main():
        os.dup2(1, 2)  # to the terminal; the standard error of torchrun and the other ranks goes to log.txt
    try:
        execute_rank(config, path.parent)
    except Exception as error:
        run_folder.fail(path.parent, error)
        sys.exit(1)
