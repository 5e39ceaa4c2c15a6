"""The one entry point: compose the configuration, check everything, run, print the result.

python train.py                                       stepwise DPO on the built-in laboratory
python train.py split=all_at_once reference=initial   plain DPO
python train.py --help                                the axes and their options
"""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from sdpo import distributed, validate
from sdpo.errors import UserError
from sdpo.launch import help
from sdpo.launch import local as launch
from sdpo.run import folder as run_folder
from sdpo.run.folder import Run

composed: list[tuple[DictConfig, DictConfig]] = []


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def compose(job: DictConfig) -> None:
    """Keep what Hydra composed for a single run; the runs of a sweep go to its launcher."""
    composed.append((job, HydraConfig.get()))


def main(arguments: list[str]) -> None:
    if {"--help", "-h"} & set(arguments):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # into `head` it ends quietly
        print(help.show([argument for argument in arguments if not argument.startswith("-")]))
        return
    launch.refuse_ranks()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what is wrong, instead of printing it
    compose()
    for job, settings in composed:
        folder = Path(settings.runtime.output_dir)
        try:
            single(run_folder.of(job, settings, folder))
        finally:
            with suppress(OSError):
                folder.rmdir()  # Hydra made it; what was refused or only planned leaves it empty


def single(run: Run) -> None:
    """One run, in this process or with ranks of its own, and what came of it."""
    distributed.set_threads(run.config.launch.threads)  # before torch starts
    validate.check(run.config)
    if run.config.plan:
        from sdpo.plan import report

        report.show([run])
        return
    run.prepare()
    summary = launch.run(run.config, run.folder)
    from analysis import report
    from sdpo import console

    for step in summary["steps"]:
        print(console.step_line(step))
    print(f"report: {report.write_report(run.folder)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except (HydraException, OmegaConfBaseException, UserError, OSError) as error:
        sys.exit(f"error: {help.explain(error, sys.argv[1:])}")
