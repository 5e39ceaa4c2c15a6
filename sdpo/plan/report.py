"""What would be trained, before anything is: the distinct steps of some runs, which of them exist, and the flops."""

import io
import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from typing import NamedTuple

from sdpo.config import Config, Optim, Record
from sdpo.console import columns, progress
from sdpo.plan import dry_run, flops
from sdpo.plan.dry_run import Planned
from sdpo.run.folder import Run
from sdpo.store import ReadOnly

HEAD = ("arm", "runs", "steps", "exist", "that took", "to train", "tokens", "FLOPs", "GPU-hours")
MACHINE = f"{flops.GPUS} {flops.GPU} at {flops.UTILISATION:.0%} of {flops.PEAK / 1e12:.0f} TFLOP/s"

Steps = dict[str, Planned]  # by key


class Foreseen(NamedTuple):
    """A run before it runs."""

    run: Run
    initial: list[Planned]  # the step that makes S, where one does
    for_scores: list[Planned]  # models that only score the pairs
    steps: list[Planned]  # M_1 .. M_T


def show(asked: list[Run]) -> None:
    """Print what there is to know before these runs."""
    print(text(of(asked)))


def of(asked: list[Run]) -> list[Foreseen]:
    """Every run with its steps by name. UserError for what would be an error of the run before its first step."""
    store, ready, foreseen = ReadOnly(), {}, []
    bar = progress(len(asked), "plan", "runs")
    with _offline(asked), redirect_stderr(io.StringIO()):  # doubts about an order are for the run to tell
        for run in asked:
            reads = _read_by_prepare(run.config)
            if reads not in ready:
                ready[reads] = dry_run.prepare_by_name(run.config, store)
            given = run.config, ready[reads]
            foreseen.append(Foreseen(run, ready[reads].steps, dry_run.for_scores(*given), dry_run.steps(*given)))
            bar.update()
    bar.close()
    return foreseen


def distinct(steps: Iterable[Planned]) -> Steps:
    """The steps by key, each once however many runs share it."""
    by_key: Steps = {}
    for step in steps:
        if step.model.key not in by_key or not step.unknown:
            by_key[step.model.key] = step
    return by_key


def text(foreseen: list[Foreseen]) -> str:
    """The distinct steps under the arms that they belong to, the cost of every arm, and the sum in words."""
    num_runs = Counter(one.run.arm for one in foreseen)
    arms = {arm: distinct(step for one in foreseen if one.run.arm == arm for step in one.steps) for arm in num_runs}
    before = {
        "S": distinct(step for one in foreseen for step in one.initial),
        "for scores": distinct(step for one in foreseen for step in one.for_scores),
    }
    steps = distinct(step for one in foreseen for step in one.steps)
    everything = before["S"] | before["for scores"] | steps
    rows = [_row(name, "", some) for name, some in before.items() if some]
    rows += [_row(arm, str(num_runs[arm]), arms[arm]) for arm in arms]
    rows.append(_row("all, shared ones once", str(len(foreseen)), everything))
    owners = {key: [arm for arm in arms if key in arms[arm]] for key in steps}
    lines = [*_keys(steps, owners), "", *columns([HEAD, *rows]), ""]
    return "\n".join([*lines, _count(steps, owners), *_assumptions(foreseen, everything)])


def _keys(steps: Steps, owners: dict[str, list[str]]) -> Iterator[str]:
    """Every step by its key, below its number and its arms; a star says that it exists."""
    groups: dict[tuple, list[Planned]] = {}
    for key, step in steps.items():
        groups.setdefault((step.t, ", ".join(owners[key])), []).append(step)
    for (t, arms), members in groups.items():
        names = [step.model.key[:12] + "*" * step.model.reused for step in members if not step.unknown]
        if unnamed := len(members) - len(names):
            names.append(f"({unnamed} without a name yet)")
        yield f"step {t} of {arms}"
        yield from textwrap.wrap(" ".join(names), 100, initial_indent="  ", subsequent_indent="  ")


def _row(name: str, runs: str, steps: Steps) -> tuple[str, ...]:
    exist, missing = _parted(steps)
    took = f"{sum(step.seconds for step in exist):.1f} s" if exist else ""
    total = sum(step.flops for step in missing)
    costs = (f"{sum(step.tokens for step in missing):,}", _number(total), _number(flops.gpu_hours(total)))
    return name, runs, str(len(steps)), str(len(exist)), took, str(len(missing)), *(costs if missing else ("", "", ""))


def _count(steps: Steps, owners: dict[str, list[str]]) -> str:
    exist, missing = _parted(steps)
    shared = sum(len(owners[step.model.key]) > 1 for step in missing)
    by_several = f" ({shared} shared by several arms)" if shared else ""
    return f"{len(exist)} of {len(steps)} steps exist; {len(missing)} will be trained{by_several}"


def _assumptions(foreseen: list[Foreseen], everything: Steps) -> Iterator[str]:
    """What the numbers rest on."""
    total = sum(step.flops for step in _parted(everything)[1])
    if total > 0:
        hours = _number(flops.gpu_hours(total) / flops.GPUS)
        yield f"{hours} hours on {MACHINE}; (6 E + 2) N operations per token; scores and evaluation come on top"
    if math.isnan(total):
        yield "a model's size is not known: set model.parameters, and reference.parameters where it is external"
    reasons = Counter(step.unknown for one in foreseen for step in one.steps[-1:] if step.unknown)
    for reason, num in reasons.items():
        yield f"the chunks of {num} of {len(foreseen)} runs are not known yet, because {reason}:"
        yield "they are taken to be as large as the settings say, and those that turn out equal will be trained on once"


def _parted(steps: Steps) -> tuple[list[Planned], list[Planned]]:
    """The steps that exist, and those that do not."""
    exist = [step for step in steps.values() if step.model.reused]
    return exist, [step for step in steps.values() if not step.model.reused]


def _number(value: float) -> str:
    if math.isnan(value):
        return "?"
    return f"{value:.3g}" if value >= 0.01 else "<0.01"


def _read_by_prepare(config: Config) -> str:
    """The part of a configuration that inputs depend on: runs that agree in it have the same ones."""
    ignored = {"split": {}, "score": {}, "start": "previous", "loss": {}, "optim": Optim(), "evaluate": {}}
    ignored |= {"record": Record(), "seed": 0, "T": 0, "steps": {}}
    if config.reference["name"] != "external":
        ignored["reference"] = {}
    return repr(replace(config, **ignored))


@contextmanager
def _offline(asked: list[Run]) -> Iterator[None]:
    """Nothing is downloaded: the Hub's libraries ask their own switches before they do."""
    from huggingface_hub import constants

    switches = [constants]
    if any(run.config.data.name == "hub" for run in asked):
        import datasets.config

        switches.append(datasets.config)
    before = [module.HF_HUB_OFFLINE for module in switches]
    for module in switches:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(switches, before, strict=True):
            module.HF_HUB_OFFLINE = value
