"""The entry point: compose the configuration, check it, run it, and print the result.

python train.py                                       stepwise DPO on the built-in laboratory
python train.py split=all_at_once reference=initial   plain DPO
python train.py --help                                the axes and their options
"""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from sdpo import distributed, validate
from sdpo.errors import UserError, disk_as_user_error
from sdpo.launch import help, unread
from sdpo.launch import local as launch
from sdpo.launch.nodes import by_hand
from sdpo.run.folder import Run

composed: list[tuple[DictConfig, DictConfig]] = []  # the configuration of a single run, and Hydra's own


@hydra.main(version_base="1.3", config_path=str(help.CONF), config_name="config")
def compose(job: DictConfig) -> None:
    """Keep what Hydra composed for a single run. The runs of a sweep go to the launcher instead."""
    composed.append((job, cast(DictConfig, HydraConfig.get())))


def main(arguments: list[str]) -> None:
    """Show help, or do the run or sweep that the arguments describe."""
    if {"--help", "-h", "help"} & set(arguments):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `--help | head` ends quietly
        print(help.show([argument for argument in arguments if not argument.startswith("-") and argument != "help"]))
        return
    launch.refuse_ranks()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them
    compose()
    for job, hydra_config in composed:
        folder = Path(hydra_config.runtime.output_dir)
        try:
            unread.refuse_launcher(hydra_config, is_sweep=False)
            single(Run.from_composed(job, hydra_config, folder), job, hydra_config.overrides.task)
        finally:
            with suppress(OSError):  # it is not empty
                folder.rmdir()  # Hydra made it; a run that was refused or only planned leaves it empty


def single(run: Run, job: DictConfig, overrides: Sequence[str]) -> None:
    """Do one run, in this process or in one process per rank, and print its steps and where the report is."""
    distributed.set_threads(run.config.launch.threads)  # before torch starts
    unread.refuse({run.arm: (job, overrides)})
    validate.check(run.config)
    if run.config.plan:
        from sdpo.plan import report as plan

        plan.show([run])
        return
    if run.config.launch.nodes > 1:
        if run.finished:
            print(f"finished; its report: python -m analysis.report {run.folder}")
            return
        run.prepare()
        print(f"prepared; start it on every node N: {by_hand(run.folder, run.config.launch.nodes)}")
        return
    run.prepare()
    try:
        summary = launch.run(run.config, run.folder)
    except UserError:
        run.withdraw()
        raise
    from analysis.report import write_report
    from sdpo.console import step_line

    for step in summary["steps"]:
        print(step_line(step))
    print(f"report: {write_report(run.folder)}")


def command() -> None:
    """The command line: `python train.py`, or `sdpo-train` where the package is installed."""
    try:
        with disk_as_user_error():
            main(sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except (HydraException, OmegaConfBaseException, UserError) as error:
        sys.exit(f"error: {help.explain(error, sys.argv[1:])}")


if __name__ == "__main__":
    command()
