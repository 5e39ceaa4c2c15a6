"""What Hydra finds of this project when it starts, because it looks for plugins in this namespace only.

The schema that every configuration is composed onto, the names of run and sweep folders, and the launcher of sweeps.
What the launcher does is sdpo/sweep.py, which knows nothing of Hydra.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from sdpo.config import Config
from sdpo.run import folder as run_folder

SEED = "seed="  # the override that tells the runs of an arm apart


@dataclass
class Schema(Config):
    steps: dict[Any, Any] = field(default_factory=dict)  # a command line writes the number of a step as a word


def _schema() -> DictConfig:
    """What every configuration is composed onto; into its mappings a command line may write keys of its own."""
    schema = OmegaConf.structured(Schema)
    for mapping in (schema.steps, schema.data.columns, schema.data.revisions, schema.data.nominal):
        OmegaConf.set_struct(mapping, False)
    return schema


ConfigStore.instance().store("schema", _schema())
OmegaConf.register_new_resolver("run_name", run_folder.run_name, replace=True)
OmegaConf.register_new_resolver("sweep_name", run_folder.sweep_name, replace=True)
OmegaConf.register_new_resolver("over", lambda value, *divisors: value / prod(divisors), replace=True)


class Arms(Launcher):
    """Does all runs of a sweep together; the keywords are conf/hydra/launcher/arms.yaml."""

    def __init__(self, n: int | str, backend: str, slurm: DictConfig, contrasts: DictConfig):
        self.settings = {
            "n": n,
            "backend": backend,
            "slurm": dict(slurm),
            "contrasts": OmegaConf.to_container(contrasts),
        }

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config
        loader = hydra_context.config_loader
        compose = loader.load_sweep_config
        self.compose = cache(lambda overrides: compose(config, list(overrides)))
        # The sweeper composes every run to see that it can be, and throws it away: most of the time of a large sweep.
        loader.load_sweep_config = lambda master_config, sweep_overrides: self.composed(sweep_overrides)

    def composed(self, overrides: Sequence[str]) -> DictConfig:
        """What Hydra composes for a run; runs that differ in the seed alone share it, and it holds the last one's."""
        arm = self.compose(tuple(override for override in overrides if not override.startswith(SEED)))
        arm.seed = next((o.removeprefix(SEED) for o in reversed(overrides) if o.startswith(SEED)), self.config.seed)
        return arm

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose every run, then do them all; errors rise to train.py."""
        from sdpo.launch import sweep

        folder = Path(self.config.hydra.sweep.dir).absolute()
        asked = {}  # by folder: what is asked for twice is done once
        for overrides, arm in zip(job_overrides, run_folder.labels(job_overrides), strict=True):
            composed = self.composed(overrides)
            place = folder / composed.hydra.sweep.subdir
            asked[place] = run_folder.of(run_folder.without_hydra(composed), composed.hydra, place, arm, folder.name)
        overrides = list(self.config.hydra.overrides.task)
        asked_for = sweep.Sweep(folder, list(asked.values()), overrides, **self.settings)
        if sweep.run(asked_for):
            from analysis import report  # here, because it imports what the runs do without

            print(f"report: {report.write_report(folder)}")
            sweep.refuse_failures(asked_for)
        return []
