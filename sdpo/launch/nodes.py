"""Where a process stands among the nodes of one run, and how torchrun brings their ranks together."""

import os
import socket
from pathlib import Path
from typing import NamedTuple

from sdpo.config import Launch
from sdpo.errors import UserError

PATIENCE = 600  # seconds in which all nodes must have started


class Nodes(NamedTuple):
    """This node and the others."""

    node: int = 0  # the number of this one
    of: int = 1
    at: str = ""  # HOST:PORT on node 0, where the nodes meet

    def torchrun(self, ranks: int, run: str) -> list[str]:
        """The options of torchrun on this node. Raises UserError if the nodes cannot share the ranks."""
        if not 0 <= self.node < self.of:
            raise UserError(f"--node {self.node}: {self.of} nodes have the numbers 0 to {self.of - 1}")
        if ranks % self.of:
            raise UserError(f"launch.ranks={ranks} cannot be shared by {self.of} nodes: use a multiple of {self.of}")
        per_node = f"--nproc-per-node={ranks // self.of}"
        if self.of == 1:
            return ["--standalone", "--local-addr=127.0.0.1", per_node]
        here = f"is_host={self.node == 0},join_timeout={PATIENCE},read_timeout={PATIENCE}"
        meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={self.at}", f"--rdzv-id={run}", f"--rdzv-conf={here}"]
        return [f"--nnodes={self.of}", *meeting, f"--local-addr={_own_address(self.at)}", per_node]

    @property
    def log(self) -> str:
        """The file in the run folder that has what the ranks of this node print."""
        return f"log-{self.node}.txt" if self.node else "log.txt"


def alone(launch: Launch) -> Nodes:
    """The only node of a run. Raises UserError if it shall have several."""
    if launch.nodes == 1:
        return Nodes()
    raise UserError(
        f"launch.nodes={launch.nodes}, but this is no SLURM job of {launch.nodes} nodes: submit the run with "
        "`python train.py -m hydra.launcher.backend=slurm ...`, or start its prepared folder on every node N with "
        f"`{by_hand('RUN', launch.nodes)}`"
    )


def by_hand(folder: Path | str, of: int) -> str:
    """The command that executes one node's part of the run of a prepared folder."""
    return f"python -m sdpo.launch {folder}/config.yaml --node N --of {of} --at HOST_OF_NODE_0:PORT"


def of_slurm(launch: Launch) -> Nodes:
    """The place of a SLURM task among the nodes of its job; each job has a port of its own.

    Raises UserError if the run shall have several nodes, and this is no job of so many.
    """
    from submitit.slurm.slurm import SlurmJobEnvironment

    job = SlurmJobEnvironment()
    if launch.nodes == 1 or "SLURM_JOB_ID" not in os.environ or job.num_nodes != launch.nodes:
        return alone(launch)
    return Nodes(job.node, job.num_nodes, f"{job.hostnames[0]}:{10000 + int(job.raw_job_id) % 20000}")


def _own_address(at: str) -> str:
    """The address of this node in the network in which it reaches `at`; nothing is sent."""
    host, _, port = at.rpartition(":")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
    except (ValueError, OSError) as error:
        raise UserError(f"--at {at} is no HOST:PORT that this machine can find: {error}") from error
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
