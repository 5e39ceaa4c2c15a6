"""Stepwise DPO, the outer loop. How it differs from DPO:

1. the preference data is cut into chunks, and step t trains on chunk t alone, with a fresh optimiser and schedule;
2. the reference of step t is the model that step t-1 produced, not S;
3. the policy of step t starts there too.
"""

import json
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from sdpo import config, distributed
from sdpo.config import Config
from sdpo.curriculum.build import build
from sdpo.errors import UserError
from sdpo.evals.evaluator import Evaluator
from sdpo.metrics import Recorder
from sdpo.run import results
from sdpo.store import Store
from sdpo.train.schedule import Span, updates
from sdpo.train.setup import prepare
from sdpo.train.step import take_step
from sdpo.train.step_key import StepSpec
from sdpo.wandb_mirror import WandbMirror


def run(settings: Config, folder: Path) -> dict:
    """Train and measure M_1 .. M_T; returns what summary.json holds. Steps that exist are found, not trained."""
    began = time.monotonic()
    with _recorder(settings, folder) if distributed.is_main() else nullcontext() as recorder:
        inputs = prepare(settings, Store())
        runner, history = inputs.runner, [inputs.initial]
        curriculum = build(inputs, settings, inputs.initial)
        spans = whole_run(list(map(len, curriculum.chunks)), curriculum.complete, settings)
        evaluator = Evaluator(inputs, settings, recorder)
        runner.logprobs_of(inputs.initial, inputs.followed(curriculum.chunks))
        evaluator.add_initial()
        for t in range(1, curriculum.num_steps + 1):
            step_began, chunk = time.monotonic(), curriculum.chunk(t - 1, history[-1])
            here, followed = config.for_step(settings, t), inputs.followed(curriculum.chunks)
            start = history[-1] if here.start == "previous" else history[0]
            spec = StepSpec(t, here, start, list(history), inputs.chunk(chunk), spans.get(t), followed)
            step = take_step(spec, runner, partial(evaluator.log, "train", t))
            runner.logprobs_of(step.model, followed)
            evaluator.add(step, chunk, time.monotonic() - step_began)
            history.append(step.model)
        return results.write(folder, curriculum, evaluator, time.monotonic() - began)


def whole_run(num_pairs: list[int], complete: bool, settings: Config) -> dict[int, Span]:
    """Where each step lies in a schedule that spans the run; empty if every step has its own schedule.

    `num_pairs` are those of each step. UserError if they are not `complete` before the first step.
    """
    if settings.optim.schedule_over == "step":
        return {}
    if not complete:
        raise UserError("optim.schedule_over=run needs all chunks before the first step; score.model=current has not")
    optims = [config.for_step(settings, t).optim for t in range(1, len(num_pairs) + 1)]
    counts = [len(updates(num, optim, 0)) for num, optim in zip(num_pairs, optims, strict=True)]
    return {t: Span(sum(counts[: t - 1]), sum(counts)) for t in range(1, len(counts) + 1)}


def _recorder(settings: Config, folder: Path) -> Recorder:
    """The run's metrics file, with its W&B copy if one is asked for."""
    if not settings.record.wandb:
        return Recorder(folder)
    named = json.loads((folder / "manifest.json").read_text())
    return Recorder(folder, WandbMirror(folder, settings, named["arm"], named["choices"], named["sweep"]))
