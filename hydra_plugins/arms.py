"""The parts of this project that Hydra loads when it starts; it looks for plugins in this namespace only.

They are the schema of every configuration, the resolvers that name run and sweep folders, and the launcher of sweeps.
The launcher composes the runs; sdpo/launch/sweep.py does them and does not know Hydra.
"""

import os
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

from sdpo import distributed
from sdpo.config import Config
from sdpo.run import folder as run_folder
from sdpo.run.folder import Run

SEED = "seed="  # the override in which the runs of an arm differ


@dataclass
class Schema(Config):
    steps: dict[Any, Any] = field(default_factory=dict)  # on a command line the number of a step is a string


def _schema() -> DictConfig:
    """The schema of every configuration. A command line may add keys to the mappings named here.

    The open axes are among them, because Hydra composes a sweep first without its swept options: in a sweep over splits
    split.num_chunks=3 belongs to no option yet. `sdpo.validate` refuses keys that the option of a run does not have.
    """
    schema = OmegaConf.structured(Schema)
    open_axes = [schema[axis] for axis in ("split", "score", "reference", "loss", "tune")]
    for mapping in (schema.steps, schema.data.columns, schema.data.revisions, schema.data.nominal, *open_axes):
        OmegaConf.set_struct(mapping, False)
    return schema


ConfigStore.instance().store("schema", _schema())
OmegaConf.register_new_resolver("run_name", run_folder.run_name, replace=True)
OmegaConf.register_new_resolver("sweep_name", run_folder.sweep_name, replace=True)
OmegaConf.register_new_resolver("over", lambda value, *divisors: value / prod(divisors), replace=True)
OmegaConf.register_new_resolver("if_env", lambda name, yes, no: yes if os.environ.get(name) else no, replace=True)


class Arms(Launcher):
    """Does all runs of a sweep together; the keywords are those of conf/hydra/launcher/arms.yaml."""

    def __init__(self, **settings: Any):
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config
        loader = hydra_context.config_loader
        compose = loader.load_sweep_config
        self.compose = cache(lambda overrides: compose(config, list(overrides)))
        # Hydra's sweeper composes every run only to check that it can, which takes most of the time of a large sweep.
        # This attribute hides the loader's method, so that the sweeper and `launch` share one composition per arm.
        vars(loader)["load_sweep_config"] = lambda master_config, sweep_overrides: self.composed(sweep_overrides)

    def composed(self, overrides: Sequence[str]) -> DictConfig:
        """Return the configuration of a run. Runs that differ only in the seed share one object, with the last seed."""
        from sdpo.launch import sweep

        try:
            config = self.compose(tuple(override for override in overrides if not override.startswith(SEED)))
        except Exception:  # whatever Hydra refuses goes up; only the empty folder that it made goes
            sweep.leave_nothing(Path(self.config.hydra.sweep.dir))
            raise
        config.seed = next((o.removeprefix(SEED) for o in reversed(overrides) if o.startswith(SEED)), self.config.seed)
        return config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose every run, do them all, and write the report. Errors go up to train.py."""
        from sdpo.launch import sweep, unread

        folder = Path(self.config.hydra.sweep.dir).absolute()
        commands: dict[str, tuple[DictConfig, list[str]]] = {}
        runs = {}  # by folder, so that a run is done once even if it was asked for twice
        try:
            distributed.set_threads(1)  # before torch starts; every run then sets its own number
            unread.refuse_launcher(self.config.hydra, is_sweep=True)
            for overrides, arm in zip(job_overrides, run_folder.labels(job_overrides), strict=True):
                config = self.composed(overrides)
                subfolder, job = folder / config.hydra.sweep.subdir, run_folder.without_hydra(config)
                runs[subfolder] = Run.from_composed(job, config.hydra, subfolder, arm, folder.name)
                commands.setdefault(arm, (job, config.hydra.overrides.task))
            unread.refuse(commands)
            asked = sweep.Sweep(folder, list(runs.values()), list(self.config.hydra.overrides.task), **self.settings)
            is_done = sweep.run(asked)
        finally:
            sweep.leave_nothing(folder)
        if is_done:
            from analysis import report  # here, because the runs do not need its libraries

            print(f"report: {report.write_report(folder)}")
            sweep.refuse_failures(asked)
        return []
