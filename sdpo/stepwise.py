"""Stepwise DPO (Kim et al. 2403.19270): the outer loop. Three things differ from DPO:

1. The preference data is cut into chunks, and step t trains on chunk t only, with a new optimiser and schedule.
2. The reference of step t is the model that step t-1 produced, not the SFT model S.
3. The policy of step t starts from that model too.
"""

import json
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from sdpo import distributed
from sdpo.config import Config, for_step
from sdpo.curriculum import rounds
from sdpo.curriculum.build import build
from sdpo.errors import UserError
from sdpo.evals.evaluator import Evaluator
from sdpo.metrics import CLOCK, Recorder
from sdpo.run import results
from sdpo.run.needs import with_states
from sdpo.store.artifacts import Store
from sdpo.train.schedule import Span, updates
from sdpo.train.setup import prepare
from sdpo.train.step import take_step
from sdpo.train.step_key import StepSpec
from sdpo.wandb_mirror import WandbMirror


def run(config: Config, folder: Path) -> dict:
    """Train and evaluate M_1 .. M_T, and return the content of summary.json. Steps in the store are not trained."""
    began, config = time.monotonic(), with_states(config)
    CLOCK.start()
    with _recorder(config, folder) if distributed.is_main() else nullcontext() as recorder, Store() as store:
        inputs = prepare(config, store)
        runner, history = inputs.runner, [inputs.initial]
        curriculum = build(inputs, config, inputs.initial)
        complete = curriculum.complete and config.rounds.name == "given"
        spans = whole_run(list(map(len, curriculum.chunks)), complete, config)
        evaluator = Evaluator(inputs, config, recorder)
        # Score all rows that a later step or the trajectory reads under S, while S is loaded. The store keeps them.
        runner.logprobs_of(inputs.initial, inputs.followed(curriculum.chunks))
        evaluator.add_initial()
        for t in range(1, curriculum.num_steps + 1):
            step_began, indices = time.monotonic(), curriculum.indices(t - 1, history[-1])
            step_config, followed = for_step(config, t), inputs.followed(curriculum.chunks)
            start = history[-1] if step_config.start == "previous" else history[0]
            chunk = rounds.chunk(inputs, config, indices, history[-1])
            spec = StepSpec(t, step_config, start, list(history), chunk, spans.get(t), followed)
            step = take_step(spec, runner, partial(evaluator.log, "train", t), in_background=True)
            runner.logprobs_of(step.model, followed)  # the same under M_t
            evaluator.add(step, indices, time.monotonic() - step_began)
            history.append(step.model)
        store.join()
        return results.write(folder, curriculum, evaluator, time.monotonic() - began)


def whole_run(num_pairs: list[int], complete: bool, config: Config) -> dict[int, Span]:
    """Return the part of each step in a schedule that spans the run; empty if every step has its own schedule.

    `num_pairs` has the number of pairs of each step. Raises UserError if it is not `complete` before the first step.
    """
    if config.optim.schedule_over == "step":
        return {}
    if not complete:
        raise UserError(
            "optim.schedule_over=run needs all pairs before the first step, but score.model=current and "
            "rounds=on_policy make those of a step when it begins: use optim.schedule_over=step"
        )
    optims = [for_step(config, t).optim for t in range(1, len(num_pairs) + 1)]
    counts = [len(updates(num, optim, 0)) for num, optim in zip(num_pairs, optims, strict=True)]
    return {t: Span(sum(counts[: t - 1]), sum(counts)) for t in range(1, len(counts) + 1)}


def _recorder(config: Config, folder: Path) -> Recorder:
    """The recorder of the run's metrics, with a W&B copy if the configuration asks for one."""
    if not config.record.wandb:
        return Recorder(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    return Recorder(folder, WandbMirror(folder, config, manifest["arm"], manifest["choices"], manifest["sweep"]))
