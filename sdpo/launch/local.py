"""One run: on one rank in this process, or on several under torchrun.

A run of one rank is executed in the process that asks for it. A run of several ranks is executed by children of
torchrun, which read config.yaml in the run folder, as a cluster job does: `python -m sdpo.launch RUN/config.yaml`. If
the ranks are on several nodes, this command is started on each of them.
"""

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from sdpo import config as configuration
from sdpo.config import Config
from sdpo.console import step_line
from sdpo.distributed import STOPPED, stop_requested, stops_deferred
from sdpo.errors import UserError
from sdpo.launch import rank
from sdpo.launch.nodes import Nodes, alone, of_slurm
from sdpo.run import folder as run_folder
from sdpo.run.folder import Run
from sdpo.store.artifacts import try_lock

CHECKOUT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--signals-to-handle=SIGINT", "--shutdown-timeout=10"]
IGNORING = ["sh", "-c", "trap '' TERM USR2 HUP; exec \"$@\"", "sh"]  # torchrun; its ranks set their own handlers
HAS_STOPPED = rf"exitcode\s*: {STOPPED}\b"  # in torchrun's log


def refuse_ranks() -> None:
    """Raise UserError if this process is itself a rank of torchrun, deepspeed or mpirun."""
    given = [name for name in ("RANK", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK") if name in os.environ]
    given += [argument for argument in sys.argv if argument.startswith("--local")]
    if given:
        raise UserError(
            f"train.py starts its own ranks, but {given[0]} says that it is one: "
            "start it without torchrun, deepspeed or mpirun, and set launch.ranks=8 for eight GPUs"
        )


def run(config: Config, folder: Path, nodes: Nodes | None = None) -> dict:
    """Execute the run that `folder` was prepared for, or this node's part of it. Returns its summary.

    An error is raised, and also written to error.txt in the folder.
    """
    try:
        nodes = nodes or alone(config.launch)
        with nullcontext() if nodes.node else _locked(folder):
            if not Run(config, folder, choices={}, arm="").finished:  # another process may have just finished it
                if nodes.node == 0:
                    (folder / "error.txt").unlink(missing_ok=True)  # the failure of that process
                if config.launch.ranks == nodes.of == 1:
                    rank.exit_at_signals()
                    rank.execute(config, folder)
                else:
                    _start_ranks(config, folder, nodes)
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


def job(folder: Path) -> list[str]:
    """The command that executes the run of a prepared folder, on this machine or another one."""
    return ["env", f"PYTHONPATH={python_path()}", sys.executable, "-m", "sdpo.launch", str(folder / "config.yaml")]


def _start_ranks(config: Config, folder: Path, nodes: Nodes) -> None:
    """Execute torchrun until it ends. Raises UserError with the error of the first rank that failed."""
    torchrun = [sys.executable, *TORCHRUN, *nodes.torchrun(config.launch.ranks, folder.name)]
    script = ["-m", "sdpo.launch", str(folder / "config.yaml")]
    path = folder / nodes.log
    with socket.create_server(("127.0.0.1", 0)) as server, path.open("ab") as log:
        env = {**os.environ, "PYTHONPATH": python_path(), rank.PARENT: str(server.getsockname()[1])}
        env["OMP_NUM_THREADS"] = str(config.launch.threads)
        begin = log.tell()
        agent = subprocess.Popen([*IGNORING, *torchrun, *script], env=env, stderr=log, start_new_session=True)
        try:
            with stops_deferred():
                _follow(agent, server)
        finally:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)  # its ranks end when `server` closes
                agent.wait()
    if agent.returncode:
        raise _cause(config, path, path.read_bytes()[begin:].decode(errors="replace"))


def _follow(agent: subprocess.Popen, server: socket.socket) -> None:
    """Wait until torchrun ends. If this process is told to stop, tell every rank that has connected to `server`."""
    server.settimeout(0.1)
    with ExitStack() as connections:
        waiting: list[socket.socket] = []
        while agent.poll() is None:
            with suppress(TimeoutError):
                waiting.append(connections.enter_context(server.accept()[0]))
            while stop_requested() and waiting:
                with suppress(ConnectionError):  # it has ended
                    waiting.pop().send(b"!")


def _cause(config: Config, path: Path, log: str) -> BaseException:
    """Why the ranks ended. If one was killed, the others only report its loss; so torchrun's log is read first.

    The last part of the log is about the rank that ended first. After it torchrun tells the others to stop, which may
    end with STOPPED for that reason alone, and kills those that do not.
    """
    if rank.WATCHDOG in log:
        return UserError(rank.late(config.launch))
    first = log.rpartition("Root Cause")[2]
    if re.search(HAS_STOPPED, first):
        return SystemExit(STOPPED)
    see = f"{path} has the details"
    signals = re.findall(r"Signal \d+ \((\w+)\) received", first)
    if killed := [name for name in signals if name != "SIGTERM"]:  # torchrun ends the remaining ranks with SIGTERM
        (path.parent / "error.txt").unlink(missing_ok=True)
        return UserError(f"a rank was killed by {killed[0]}; {see}")
    return UserError(run_folder.failure(path.parent) or f"torchrun died; {see}")


def python_path() -> str:
    """The PYTHONPATH with which children find this package from any working directory."""
    return os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))


def main(arguments: list[str]) -> None:
    """Execute a whole run, one node's part of it or, under torchrun, one rank of it."""
    parser = ArgumentParser("python -m sdpo.launch", description="Execute the run of a prepared folder.")
    parser.add_argument("config", type=Path, help="config.yaml in the run folder")
    parser.add_argument("--node", type=int, default=0, help="number of this node, from 0")
    parser.add_argument("--of", type=int, help="number of nodes; without it that of the SLURM job")
    parser.add_argument("--at", default="", help="HOST:PORT on node 0, where the nodes meet")
    given = parser.parse_args(arguments)
    folder = given.config.parent
    if not (given.config.is_file() and (folder / "manifest.json").is_file()):
        raise UserError(f"{folder} is no prepared run: `python train.py launch.nodes=2 ...` or a sweep prepares one")
    config = configuration.load(given.config)
    if rank.PARENT in os.environ:
        rank.main(config, folder)
    else:
        nodes = Nodes(given.node, given.of, given.at) if given.of else of_slurm(config.launch)
        summary = run(config, folder, nodes)
        for step in summary["steps"] if nodes.node == 0 else []:
            print(step_line(step))
