"""The runs of a sweep on a cluster: one job per run, which reads config.yaml in the run folder."""

import json
import os
import select
import subprocess
import time
from pathlib import Path

import submitit
from submitit.helpers import Checkpointable, DelayedSubmission, as_completed
from tqdm import tqdm

from sdpo.config import Launch, Settings
from sdpo.distributed import STOPPED
from sdpo.errors import UserError
from sdpo.launch import local as launch
from sdpo.launch.order import by_first_missing_step
from sdpo.launch.summary import note_end
from sdpo.run.folder import Run, write_json

KINDS = {"slurm": submitit.SlurmJob, "local": submitit.LocalJob}
ALIVE = ("PENDING", "RUNNING", "REQUEUED", "SUSPENDED", "COMPLETING")  # states of jobs that execute their run
MOST_TIMEOUTS = 100  # times that a job is requeued at its time limit
LAST_WORDS = 600  # seconds in which the cluster ends or requeues a job whose run has stopped


class Execution(Checkpointable):
    """What a job does: its run's command, once per node. Before a requeue the run saves a checkpoint."""

    def __init__(self, folder: Path):
        self.command = launch.job(folder)
        self.process: subprocess.Popen | None = None

    def __call__(self) -> None:
        """Execute the run. Raises RuntimeError if it fails."""
        self.process = subprocess.Popen(self.command)
        _wait(self.process)
        code = self.process.wait()
        if code == STOPPED:
            time.sleep(LAST_WORDS)  # until the task of node 0 has requeued the job
        if code:
            raise RuntimeError(f"{self.command[-1]} ended with code {code}")

    def checkpoint(self) -> DelayedSubmission:
        """Stop the run and return what the requeued job does. Called on node 0, in a handler of signals."""
        if self.process and self.process.returncode is None:
            self.process.terminate()
            _wait(self.process)
        self.process = None  # which cannot be pickled
        return DelayedSubmission(self)


def execute(todo: list[Run], folder: Path, slurm: Settings, bar: tqdm) -> None:
    """Submit the runs of a sweep that no job executes yet, and wait for all. An interrupt cancels them."""
    jobs = submit([turn.run for turn in by_first_missing_step(todo)], folder, slurm)
    runs = {job.job_id: one for one, job in jobs}
    try:
        for job in as_completed([job for _, job in jobs], poll_frequency=2):
            failure = job.exception()
            last_line = str(failure).strip().splitlines()[-1:] if failure else []
            note_end(runs[job.job_id], bar, f"the job failed: {' '.join(last_line)}" if failure else None)
    except KeyboardInterrupt:
        for _, job in jobs:
            job.cancel()
        raise


def submit(todo: list[Run], folder: Path, slurm: Settings) -> list[tuple[Run, submitit.Job]]:
    """Each run with its job: one that still executes it, or a new one. The ids of all jobs are kept in jobs.json.

    `slurm` are submitit's parameters; what they leave open follows from `launch`.
    """
    settings, listed = dict(slurm), folder / "jobs.json"
    cluster = settings.pop("cluster", "slurm")
    if cluster not in KINDS:
        raise UserError(f"hydra.launcher.slurm.cluster is {cluster!r}; it can be {', '.join(KINDS)}")
    known = json.loads(listed.read_text()) if listed.is_file() else {}
    jobs, new = [], dict[str, list[Run]]()
    for one in todo:
        id = known.get(one.folder.name)
        job = KINDS[cluster](folder / "slurm", id, range(one.config.launch.nodes)) if id else None
        if job and job.state in ALIVE:
            jobs.append((one, job))
        else:
            new.setdefault(json.dumps(resources(one.config.launch)), []).append(one)
    os.environ["PYTHONPATH"] = launch.python_path()  # with which a job finds this package
    try:
        executor = submitit.AutoExecutor(folder / "slurm", cluster, slurm_max_num_timeout=MOST_TIMEOUTS)
        for needs, runs in new.items():
            executor.update_parameters(**{"name": folder.name, **json.loads(needs), **settings})
            with executor.batch():
                jobs += [(one, executor.submit(Execution(one.folder))) for one in runs]
    except (NameError, RuntimeError, ValueError) as error:  # what submitit raises for unknown parameters
        raise UserError(f"hydra.launcher.slurm: {error}") from error
    write_json(listed, known | {one.folder.name: job.job_id for one, job in jobs})
    return jobs


def resources(launch: Launch) -> Settings:
    """The parameters of submitit that follow from a run's ranks: one task per node, which starts its ranks."""
    per_node = launch.ranks // launch.nodes
    gpus = {} if launch.device == "cpu" else {"gpus_per_node": per_node}
    nodes = {"nodes": launch.nodes, "tasks_per_node": 1, "cpus_per_task": per_node * launch.threads}
    # If one node fails, the others end. A run has five minutes to save a checkpoint before its time limit.
    return nodes | gpus | {"slurm_srun_args": ["--kill-on-bad-exit=1"], "slurm_signal_delay_s": 300}


def _wait(process: subprocess.Popen) -> None:
    """Wait until the process ends. Popen.wait holds a lock, which a handler of signals would wait for."""
    descriptor = os.pidfd_open(process.pid)
    select.select([descriptor], [], [])
    os.close(descriptor)
