"""The runs of a sweep on a cluster: one job per run, which reads config.yaml in the run folder."""

from pathlib import Path

from tqdm import tqdm

from sdpo.config import Settings
from sdpo.errors import UserError
from sdpo.launch import local as launch
from sdpo.launch.order import by_first_missing_step
from sdpo.launch.summary import note_end
from sdpo.run.folder import Run


def execute(todo: list[Run], folder: Path, slurm: Settings, bar: tqdm) -> None:
    """Submit a sweep's runs with submitit's parameters `slurm`, and wait for all. An interrupt cancels them."""
    import submitit

    settings, todo = dict(slurm), by_first_missing_step(todo)
    try:
        executor = submitit.AutoExecutor(folder / "slurm", cluster=settings.pop("cluster", "slurm"))
        executor.update_parameters(name=folder.name, **settings)
    except (NameError, RuntimeError, ValueError) as error:  # what submitit raises for unknown parameters
        raise UserError(f"hydra.launcher.slurm: {error}") from error
    with executor.batch():
        jobs = [executor.submit(submitit.helpers.CommandFunction(launch.job(one.folder))) for one in todo]
    try:
        for job in submitit.helpers.as_completed(jobs, poll_frequency=2):
            failure = job.exception()
            last_line = str(failure).strip().splitlines()[-1:] if failure else []
            note_end(todo[jobs.index(job)], bar, f"the job failed: {' '.join(last_line)}" if failure else None)
    except KeyboardInterrupt:
        for job in jobs:
            job.cancel()
        raise
