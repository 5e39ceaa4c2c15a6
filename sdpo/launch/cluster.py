"""The runs of a sweep on a cluster: one job per run, which reads config.yaml in the run folder."""

import json
import os
import select
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import submitit
from submitit.core.utils import UncompletedJobError
from submitit.helpers import Checkpointable, DelayedSubmission, as_completed
from tqdm import tqdm

from sdpo.config import Launch, Settings
from sdpo.distributed import STOPPED
from sdpo.errors import UserError
from sdpo.launch import local as launch
from sdpo.launch.order import by_first_missing_step
from sdpo.launch.summary import note_end
from sdpo.run.folder import Run, write_json

CLUSTERS = ("slurm", "local")
MOST_TIMEOUTS = 100  # times that a job is requeued at its time limit
LAST_WORDS = 600  # seconds in which the cluster ends or requeues a job whose run has stopped
AT_SIGNAL = (STOPPED, -signal.SIGTERM, -signal.SIGUSR2)  # negative: before the run could handle it, or after its end


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
        if code in AT_SIGNAL:
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
        waiting = [job for _, job in jobs]
        while waiting:
            ended = as_completed(waiting, poll_frequency=2)
            waiting = [job for job in ended if not _note_end(job, runs[job.job_id], bar)]
            submitit.SlurmJob.watcher.clear()  # which takes a job that is requeued for one that has ended
    except KeyboardInterrupt:
        for _, job in jobs:
            job.cancel(check=False)  # SLURM refuses for a job that has ended
        raise


def submit(todo: list[Run], folder: Path, slurm: Settings) -> list[tuple[Run, submitit.Job]]:
    """Each run with its job: one that still executes it, or a new one. The ids of jobs are kept in jobs.json, at once.

    `slurm` are submitit's parameters; what they leave open follows from `launch`.
    """
    cluster, listed = slurm.get("cluster", "slurm"), folder / "jobs.json"
    if cluster not in CLUSTERS:
        raise UserError(f"hydra.launcher.slurm.cluster is {cluster!r}; it can be {', '.join(CLUSTERS)}")
    known = json.loads(listed.read_text()) if listed.is_file() else {}
    queued = _queued() if known and cluster == "slurm" else set()
    jobs, new = list[tuple[Run, submitit.Job]](), dict[str, list[Run]]()
    for one in todo:
        id = known.get(one.folder.name)
        tasks = range(one.config.launch.nodes)
        job: submitit.Job | None = submitit.SlurmJob(folder / "slurm", id, tasks) if id in queued else None
        if job and not job.task(0).paths.result_pickle.exists():  # with a result it only waits for its node
            jobs.append((one, job))
        else:
            new.setdefault(json.dumps(_parameters(one.config.launch, folder, slurm)), []).append(one)
    os.environ["PYTHONPATH"] = launch.python_path()  # with which a job finds this package
    with _refusals():
        executor = submitit.AutoExecutor(folder / "slurm", cluster, slurm_max_num_timeout=MOST_TIMEOUTS)
        for parameters, runs in new.items():
            executor.update_parameters(**json.loads(parameters))
            with executor.batch():
                submitted = [(one, executor.submit(Execution(one.folder))) for one in runs]
            jobs += submitted
            known |= {one.folder.name: job.job_id for one, job in submitted}
            write_json(listed, known)
    return jobs


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn what submitit raises for unknown parameters into a UserError."""
    try:
        yield
    except (NameError, RuntimeError, ValueError) as error:
        raise UserError(f"hydra.launcher.slurm: {error}") from error


def announce(todo: list[Run], folder: Path, slurm: Settings) -> str:
    """What each job of a sweep would be submitted with, as text. Raises UserError as `submit` does."""
    for one in todo:
        with _refusals():
            dry = submitit.AutoExecutor(folder / "slurm", "debug")
            dry.update_parameters(**_parameters(one.config.launch, folder, slurm))
    each = (_parameters(one.config.launch, folder, slurm) for one in todo)
    jobs = Counter(", ".join(f"{name}={value}" for name, value in asked.items()) for asked in each)
    return "\n".join(f"{number} jobs, one for each run, with {asked}" for asked, number in jobs.items())


def _parameters(launch: Launch, folder: Path, slurm: Settings) -> Settings:
    """The parameters of submitit for a run: those given, and for the rest what follows from its ranks."""
    given = {name: value for name, value in slurm.items() if name != "cluster"}
    return {"name": folder.name, **resources(launch), **given}


def resources(launch: Launch) -> Settings:
    """The parameters of submitit that follow from a run's ranks: one task per node, which starts its ranks."""
    per_node = launch.ranks // launch.nodes
    gpus = {} if launch.device == "cpu" else {"gpus_per_node": per_node}
    nodes = {"nodes": launch.nodes, "tasks_per_node": 1, "cpus_per_task": per_node * launch.threads}
    # If one node fails, the others end. A run has five minutes to save a checkpoint before its time limit.
    return nodes | gpus | {"slurm_srun_args": ["--kill-on-bad-exit=1"], "slurm_signal_delay_s": 300}


def _note_end(job: submitit.Job, run: Run, bar: tqdm) -> bool:
    """Count the run of a job that ended. Returns False if the cluster requeues the job, because a node failed."""
    failure = job.exception()
    unknown = isinstance(failure, UncompletedJobError)  # the job has left no result
    if unknown and isinstance(job, submitit.SlurmJob) and job.job_id in _queued():
        return False
    why = f"ended as {job.state}" if unknown else "failed"
    note_end(run, bar, f"job {job.job_id} {why}; {job.task(0).paths.stderr} has the details" if failure else None)
    return True


def _queued() -> set[str]:
    """The ids of this user's jobs that wait, run or are about to be requeued. Raises UserError if SLURM is silent."""
    asked = ["squeue", "--me", "--array", "--noheader", "--format=%i"]
    answer = subprocess.run(asked, capture_output=True, text=True)
    if answer.returncode:
        raise UserError(f"{answer.stderr.strip()}; later, the same command waits for the jobs that still run")
    return set(answer.stdout.split())


def _wait(process: subprocess.Popen) -> None:
    """Wait until the process ends. Popen.wait holds a lock, which a handler of signals would wait for."""
    descriptor = os.pidfd_open(process.pid)
    select.select([descriptor], [], [])
    os.close(descriptor)
