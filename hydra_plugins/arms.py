"""The door through which Hydra finds the launcher of sweeps: it loads plugins from this namespace only.

Everything behind the door is sdpo/sweep.py, which knows nothing of Hydra.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class Arms(Launcher):
    """Does all runs of a sweep together; the keywords are conf/hydra/launcher/arms.yaml."""

    def __init__(self, n: int | str, backend: str, slurm: DictConfig, contrasts: DictConfig):
        self.settings = {"n": n, "backend": backend, "slurm": dict(slurm), "contrasts": list(map(list, contrasts))}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config
        loader = hydra_context.config_loader
        compose = loader.load_sweep_config
        self.compose = cache(lambda overrides: compose(config, list(overrides)))
        # The sweeper composes every run to see that it can be, and throws it away: half the time of a large sweep.
        loader.load_sweep_config = lambda master_config, sweep_overrides: self.compose(tuple(sweep_overrides))

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose every run, then do them all; errors rise to train.py."""
        from sdpo import runs, sweep

        folder = Path(self.config.hydra.sweep.dir).absolute()
        asked = {}  # by folder: what is asked for twice is done once
        for overrides, arm in zip(job_overrides, runs.labels(job_overrides), strict=True):
            composed = self.compose(tuple(overrides))
            place = folder / composed.hydra.sweep.subdir
            asked[place] = runs.of(runs.without_hydra(composed), composed.hydra, place, arm, folder.name)
        overrides = list(self.config.hydra.overrides.task)
        sweep.run(sweep.Sweep(folder, list(asked.values()), overrides, **self.settings))
        return []
