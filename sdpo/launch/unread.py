"""Refuses settings that a run would not read, and settings that contradict its arm.

Otherwise two equal runs would look like two results, or a result would carry the name of an arm that it is not of.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from sdpo.errors import UserError
from sdpo.launch.help import CONF

OF_SWEEPS = ("hydra.launcher.", "hydra.sweep.", "hydra.sweeper.")
OF_SINGLE_RUNS = ("hydra.run.",)


def refuse(runs: Mapping[str, tuple[DictConfig, Sequence[str]]]) -> None:
    """Raise UserError if these runs do not read a setting that their overrides give, or are not what their arm says.

    The runs are arm -> (what Hydra composed, overrides). In a sweep some arms may ignore a setting that others read,
    but not one that is swept.
    """
    for _, overrides in runs.values():
        _refuse_false_name(overrides)
    for key, (reads, instead) in READERS.items():
        given = {arm: value for arm, (_, overrides) in runs.items() if (value := _value(key, overrides)) is not None}
        unread = [arm for arm in given if not reads(runs[arm][0])]
        if unread and (len(unread) == len(given) or len(set(given.values())) > 1):
            who = f"the arm {unread[0]!r}" if len(runs) > 1 else "this run"
            raise UserError(f"{who} does not read {key}={given[unread[0]]}: {instead}")


def _refuse_false_name(overrides: Sequence[str]) -> None:
    """Raise UserError if an override replaces an axis that the arm itself sets: its name would be false."""
    if not (chosen := _value("arm", overrides)) or not (file := CONF / "arm" / f"{chosen}.yaml").is_file():
        return
    defaults = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(file), resolve=False)).get("defaults", [])
    for name, value in chain.from_iterable(entry.items() for entry in defaults if isinstance(entry, dict)):
        axis = name.removeprefix("override /")
        if (given := _value(axis, overrides)) not in (None, value):
            raise UserError(
                f"arm={chosen} is {axis}={value}, so with {axis}={given} its name would be false: write its axes "
                f"without the arm (`python train.py --help arm` lists them), or make an arm of your own"
            )


def _value(key: str, overrides: Sequence[str]) -> str | None:
    """The value that the overrides give to a key; None if they do not."""
    return next((value for name, _, value in (o.lstrip("+").partition("=") for o in overrides) if name == key), None)


def refuse_launcher(hydra: DictConfig, is_sweep: bool) -> None:
    """Raise UserError if a single run is given a setting of sweeps, or a sweep one of single runs."""
    keys = [override.lstrip("+~").partition("=")[0] for override in hydra.overrides.hydra]
    if wrong := [key for key in keys if key.startswith(OF_SINGLE_RUNS if is_sweep else OF_SWEEPS)]:
        what, instead = ("a sweep", "hydra.sweep.dir") if is_sweep else ("a single run", "-m, which makes it a sweep")
        raise UserError(f"{wrong[0]} is not read by {what}: use {instead}")


def _reads_t(job: DictConfig) -> bool:
    return "${T}" in OmegaConf.to_yaml(job)


def _reads_sets(job: DictConfig) -> bool:
    return job.data.name != "lab" and "preference" in job.evaluate


def _reads_held_out(job: DictConfig) -> bool:
    return bool(job.data.held_out or job.data.held_out_sets)


def _reads_score(job: DictConfig) -> bool:
    from sdpo.curriculum import chunking  # here, because it imports numpy and torch, which take seconds

    return chunking.bind_split(OmegaConf.to_container(job.split, resolve=True)).needs_scores  # type: ignore[arg-type]


# What a command may set -> whether a run reads it, and what to do if it does not.
READERS = {
    "T": (_reads_t, "set split.num_chunks (or split.num), or choose an arm that reads T, as easy_moving_chained does"),
    "data.limit": (lambda job: job.data.name != "lab", "the laboratory has data.lab.sources.NAME.num_pairs"),
    "data.held_out_sets": (_reads_sets, "add preference to evaluate, and use data=local or data=hub"),
    "data.held_out_limit": (_reads_held_out, "name held-out data, or set data.held_out_share"),
    "probe.answers_every": (lambda job: job.probe.file, "probe.file names the prompts that are answered"),
    "probe.max_new_tokens": (lambda job: job.probe.file, "probe.file names the prompts that are answered"),
    "score": (_reads_score, "leave score out, or choose split=easy_to_hard, split.keep below 1 or split.within=score"),
}
