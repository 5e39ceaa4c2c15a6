"""The plan as text: the distinct steps of some runs, which of them exist, and what the others will cost."""

import io
import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from typing import Any, NamedTuple

from sdpo import distributed
from sdpo.config import Config, Optim, Record
from sdpo.console import Progress, columns, number
from sdpo.errors import UserError
from sdpo.plan import dry_run, flops, memory
from sdpo.plan.dry_run import Planned
from sdpo.run import needs
from sdpo.run.folder import Run
from sdpo.store.artifacts import ReadOnly

HEAD = ("arm", "runs", "steps", "exist", "that took", "to train", "tokens", "FLOPs", "GPU-hours")
MACHINE = f"{flops.GPU} at {flops.UTILISATION:.0%} of {flops.PEAK / 1e12:.0f} TFLOP/s in bf16"

Steps = dict[str, Planned]  # by key


class Foreseen(NamedTuple):
    """A run and its planned steps."""

    run: Run
    size: needs.Size
    initial: list[Planned]  # the step that trains S; empty if S exists as it is
    for_scores: list[Planned]  # models that only score the pairs
    steps: list[Planned]  # M_1 .. M_T


def show(asked: list[Run]) -> None:
    """Print the plan of these runs. Raises UserError if one of them does not fit in memory."""
    foreseen = foresee(asked)
    print(text(foreseen))
    if refused := _refused(foreseen):
        raise UserError("; ".join(f"{', '.join(arms)}: {why}" for why, arms in refused.items()))


def foresee(asked: list[Run]) -> list[Foreseen]:
    """Every run with its planned steps. Raises UserError if a run would fail before its first step."""
    store, prepared, foreseen = ReadOnly(), dict[str, dry_run.Prepared](), []
    bar = Progress(len(asked), "plan", "runs")
    with _offline(asked), redirect_stderr(io.StringIO()):  # the run itself warns about a doubtful order
        for run in asked:
            reads = _read_by_prepare(run.config)
            if reads not in prepared:
                prepared[reads] = dry_run.prepare(run.config, store)
            ready = prepared[reads]
            weights = flops.count_parameters(run.config, ready.inputs.initial)
            size, config = _with_states(run.config, weights)
            for_scores = dry_run.plan_scoring_models(config, ready)
            foreseen.append(Foreseen(run, size, ready.steps, for_scores, dry_run.plan_steps(config, ready)))
            bar.update()
    bar.close()
    return foreseen


def _with_states(config: Config, weights: float) -> tuple[needs.Size, Config]:
    """The needs of a run with optim.states resolved for the planned GPU, and its configuration on this machine."""
    size = needs.Size.of(config, weights, flops.count_reference(config))
    has_gpu = distributed.device(config.launch.device).type == "cuda"
    host = needs.host_memory() if has_gpu else math.inf  # the node of a GPU that is elsewhere is not known
    states = "fp32"
    if config.launch.device != "cpu" or config.optim.states != "auto":
        states = needs.chosen_states(size, config.deepspeed.stage, needs.limit(config.launch), host)
    here = states if has_gpu or config.optim.states != "auto" else "fp32"
    return size._replace(states=states), needs.having(config, here)


def distinct(steps: Iterable[Planned]) -> Steps:
    """The steps by key; a step that several runs share appears once."""
    by_key: Steps = {}
    for step in steps:
        if step.model.key not in by_key or not step.unknown:
            by_key[step.model.key] = step
    return by_key


def text(foreseen: list[Foreseen]) -> str:
    """The distinct steps by arm, the table of costs, and how many steps will be trained."""
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
    lines += [_count(steps, owners), *_assumptions(foreseen, everything), *_needs(foreseen)]
    return "\n".join(lines)


def _keys(steps: Steps, owners: dict[str, list[str]]) -> Iterator[str]:
    """The keys of the steps, grouped by step number and arms; a star marks a step that exists."""
    groups: dict[tuple, list[Planned]] = {}
    for key, step in steps.items():
        groups.setdefault((step.t, ", ".join(owners[key])), []).append(step)
    for (t, arms), members in groups.items():
        names = [step.model.key[:12] + "*" * step.model.reused for step in members if not step.unknown]
        if unnamed := len(members) - len(names):
            names.append(f"({unnamed} whose key is not known yet)")
        yield f"step {t} of {arms}"
        yield from textwrap.wrap(" ".join(names), 100, initial_indent="  ", subsequent_indent="  ")


def _row(name: str, runs: str, steps: Steps) -> tuple[str, ...]:
    exist, missing = _split_by_existence(steps)
    took = f"{sum(step.seconds or 0.0 for step in exist):.1f} s" if exist else ""
    total = sum(step.flops for step in missing)
    costs = (f"{sum(step.tokens for step in missing):,}", number(total), number(flops.gpu_hours(total)))
    return name, runs, str(len(steps)), str(len(exist)), took, str(len(missing)), *(costs if missing else ("", "", ""))


def _count(steps: Steps, owners: dict[str, list[str]]) -> str:
    exist, missing = _split_by_existence(steps)
    shared = sum(len(owners[step.model.key]) > 1 for step in missing)
    by_several = f" ({shared} shared by several arms)" if shared else ""
    return f"{len(exist)} of {len(steps)} steps of the arms exist; {len(missing)} will be trained{by_several}"


def _assumptions(foreseen: list[Foreseen], everything: Steps) -> Iterator[str]:
    """The assumptions behind the numbers, one per line."""
    total = sum(step.flops for step in _split_by_existence(everything)[1])
    if total > 0:
        hours, longest = number(flops.gpu_hours(total)), max(foreseen, key=_hours)
        yield f"{hours} GPU-hours of an {MACHINE}: (6 E + 2) N operations per token in E epochs; evaluation costs extra"
        yield f"the longest run takes {number(_hours(longest))} hours, on {longest.run.config.launch.ranks} GPUs"
    if total > 0 and any(one.run.config.precision == "fp32" for one in foreseen):
        yield "with precision=fp32 a GPU takes several times as long"
    if any(one.run.config.data.name == "lab" and one.run.config.model.name != "lab" for one in foreseen):
        yield "the pairs are the laboratory's, on which only its own model can be trained; data=local names yours"
    if math.isnan(total):
        yield "a model's size is not known: set model.parameters, and reference.parameters if the reference is external"
    reasons = Counter(step.unknown for one in foreseen for step in one.steps[-1:] if step.unknown)
    for reason, num in reasons.items():
        yield f"the chunks of {num} of {len(foreseen)} runs are not known yet, because {reason}:"
        yield "their sizes are taken from the settings, and chunks that turn out equal will be trained on once"


def _hours(one: Foreseen) -> float:
    """Hours of a run, on each of its GPUs, if it trains all its missing steps itself."""
    missing = _split_by_existence(distinct([*one.initial, *one.for_scores, *one.steps]))[1]
    return flops.gpu_hours(sum(step.flops for step in missing)) / one.run.config.launch.ranks


def _needs(foreseen: list[Foreseen]) -> Iterator[str]:
    """What runs with missing steps need of GPUs, nodes and disk; nothing on CPUs and for models of unknown size."""
    open_runs = [one for one in foreseen if any(not step.model.reused for step in one.steps)]
    on_gpus = [one for one in open_runs if one.run.config.launch.device != "cpu" and not math.isnan(one.size.weights)]
    demands: dict[tuple, list[str]] = {}
    for one in on_gpus:
        demands.setdefault(_demand(one), []).append(one.run.arm)
    for demand, arms in demands.items():
        if len(demands) > 1:
            yield f"{', '.join(dict.fromkeys(arms))}:"
        yield from memory.lines(*demand)
    made = {step.model.key: one.size.step_on_disk for one in on_gpus for step in one.steps if not step.model.reused}
    if made:
        more = max(one.size.checkpoint for one in on_gpus) / needs.GB
        total = number(sum(made.values()) / needs.GB)
        yield f"the steps to train take {total} GB of disk, and each run up to {more:.3g} GB more while it trains"


def _demand(one: Foreseen) -> tuple[needs.Size, int | None, float, bool]:
    """The size of a run, its stage, the memory of a GPU, and whether optim.states was chosen for it."""
    config = one.run.config
    return one.size, config.deepspeed.stage, needs.limit(config.launch), config.optim.states == "auto"


def _refused(foreseen: list[Foreseen]) -> dict[str, list[str]]:
    """Why some runs cannot be trained, each with its arms."""
    refused: dict[str, list[str]] = {}
    for one in foreseen:
        if one.run.config.launch.device == "cpu" or all(step.model.reused for step in one.steps):
            continue
        why = memory.refusal(*_demand(one)[:3])
        if why and one.run.arm not in refused.setdefault(why, []):
            refused[why].append(one.run.arm)
    return refused


def _split_by_existence(steps: Steps) -> tuple[list[Planned], list[Planned]]:
    """The steps that exist, and those that do not."""
    exist = [step for step in steps.values() if step.model.reused]
    return exist, [step for step in steps.values() if not step.model.reused]


def _read_by_prepare(config: Config) -> str:
    """The part of a configuration that decides a run's inputs: runs with equal parts share them."""
    reference = config.reference if config.reference["name"] == "external" else {}
    same = replace(config, split={}, score={}, reference=reference, start="previous", loss={}, optim=Optim())
    return repr(replace(same, evaluate={}, record=Record(), seed=0, T=0, steps={}))


@contextmanager
def _offline(asked: list[Run]) -> Iterator[None]:
    """Inside this context the Hub's libraries download nothing."""
    from huggingface_hub import constants

    switches: list[Any] = [constants]  # the modules that hold a switch HF_HUB_OFFLINE
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
