"""The one entry point: compose the configuration, check everything, run, print the result.

python train.py                                       stepwise DPO on the built-in laboratory
python train.py split=all_at_once reference=initial   plain DPO
python train.py --help                                the axes and their options
"""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdpo import config, launch, runs

os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors; main() says them in one line
composed: list[tuple[DictConfig, DictConfig]] = []


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def compose(job: DictConfig) -> None:
    """Keep what Hydra composed for a single run; a sweep is run by its launcher, inside Hydra."""
    composed.append((job, HydraConfig.get()))


def main() -> None:
    compose()
    for job, hydra_settings in composed:
        folder = Path(hydra_settings.runtime.output_dir)
        settings = config.from_composed(job)
        choices = {axis: choice for axis, choice in hydra_settings.runtime.choices.items() if "/" not in axis}
        origin = {"sweep": None, "arm": None, "choices": choices, "seed": settings.seed, "command": sys.argv}
        launch.set_threads(settings.launch.threads)
        runs.prepare(settings, folder, origin)
        launch.run(settings, folder)


def run_name(*, _root_: DictConfig) -> str:
    settings = OmegaConf.to_container(
        OmegaConf.masked_copy(_root_, [k for k in _root_ if k != "hydra"]), resolve=True
    )
    return runs.name(dict(_root_.hydra.runtime.choices), settings["seed"], settings)


OmegaConf.register_new_resolver("run_name", run_name)
OmegaConf.register_new_resolver("sweep_name", lambda *, _root_: "sweep")

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {runs.one_line(error)}")
