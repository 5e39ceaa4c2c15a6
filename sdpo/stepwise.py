"""Stepwise DPO, the outer loop. How it differs from DPO:

1. the preference data is cut into chunks, and step t trains on chunk t alone, with a fresh optimiser and schedule;
2. the reference of step t is the model that step t-1 produced, not S;
3. the policy of step t starts there too.
"""

import json
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

from sdpo import config
from sdpo.config import Config
from sdpo.curriculum.build import in_order
from sdpo.evals.evaluator import Evidence
from sdpo.launch import local as launch
from sdpo.metrics import Recorder
from sdpo.run import results
from sdpo.store import Store
from sdpo.train.loop import Span, updates
from sdpo.train.setup import prepare
from sdpo.train.step import take_step


def run(settings: Config, folder: Path) -> dict:
    """Train and measure M_1 .. M_T; returns what summary.json holds. Steps that exist are found, not trained."""
    began = time.monotonic()
    origin = json.loads((folder / "manifest.json").read_text())
    names = {name: origin[name] for name in ("arm", "choices", "sweep")}
    with Recorder(folder, settings, **names) if launch.is_main() else nullcontext() as recorder:
        inputs = prepare(settings, Store())
        history, chunks = [inputs.initial], []
        evidence = Evidence(inputs, settings, recorder)
        evidence.add_initial()
        plan = in_order(inputs, settings, history)
        spans = whole_run(plan, settings)
        for t, ids in enumerate(plan, start=1):
            step_began = time.monotonic()
            here = config.for_step(settings, t)
            start = history[-1] if here.start == "previous" else history[0]
            step = take_step(inputs.bench, here, t, start, history, inputs.chunk(ids), spans.get(t))
            history.append(step.model)
            chunks.append(ids)
            evidence.add(t, step, here, time.monotonic() - step_began)
        return results.write(folder, inputs, evidence, chunks, time.monotonic() - began)


def whole_run(plan: Iterable[list[str]], settings: Config) -> dict[int, Span]:
    """The place of every step in one schedule over the run; empty where every step has its own."""
    if settings.optim.schedule_over == "step":
        return {}
    if not isinstance(plan, list):
        raise ValueError("optim.schedule_over=run needs all chunks before the first step; score.model=current has not")
    counts = [len(updates(len(ids), config.for_step(settings, t).optim, 0)) for t, ids in enumerate(plan, start=1)]
    return {t: Span(sum(counts[: t - 1]), sum(counts)) for t in range(1, len(counts) + 1)}
