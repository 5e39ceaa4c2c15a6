"""What a run learns of its models while they are in memory: measures, reference statistics, probe log-probs.

The probe set is fixed: all held-out rows and a fixed sample of every chunk, scored under every model.
"""

import hashlib
from collections import Counter
from typing import NamedTuple

import numpy as np

from sdpo import evaluate, launch
from sdpo.config import Config, choose, needs
from sdpo.inputs import Inputs
from sdpo.record import Recorder
from sdpo.step import Step
from sdpo.store import Artifact
from sdpo.tokens import TokenPair

NUM_PROBES = 64  # rows of every chunk


class Measured(NamedTuple):
    """A model, the step that made it (None for S), and what was measured on it."""

    model: Artifact
    step: Step | None
    eval: dict[str, dict]
    summary: dict | None  # the step's entry in summary.json, less its eval


class Evidence:
    """Gathers what is known of M_0 .. M_t, and logs it."""

    def __init__(self, inputs: Inputs, config: Config, recorder: Recorder | None):
        self.inputs, self.config, self.recorder = inputs, config, recorder
        self.measured: list[Measured] = []

    def add_initial(self) -> None:
        """Measure S."""
        measures = self._measure(self.inputs.initial, None)
        self._log("eval", 0, {"eval": measures})
        self.measured.append(Measured(self.inputs.initial, None, measures, None))

    def add(self, t: int, step: Step, config: Config, seconds: float) -> None:
        """Log a step that was trained or found (`config` has its overrides), and measure its model."""
        for entry in step.entries:
            self._log("train", t, entry)
        measures = self._measure(step.model, step.reference)
        losses = [entry["loss"] for entry in step.entries]
        summary = {
            "t": t,
            "num_pairs": len(step.chunk.rows),
            "sources": dict(Counter(self.inputs.pairs[row.id].source for row in step.chunk.rows)),
            "first_loss": losses[0],
            "last_loss": float(np.mean(losses[-max(1, len(losses) // 10) :])),
            **self._reference_statistics(step, config.loss.get("beta", 1.0)),
            **step.speed._asdict(),
            "reused": step.model.reused,
            "seconds": seconds,
        }
        self._log("step", t, summary)
        self._log("eval", t, {"eval": measures})
        self.measured.append(Measured(step.model, step, measures, summary))

    def probes(self, ids: list[str]) -> list[TokenPair]:
        """The sample of a chunk that is followed; it depends on the chunk's ids alone."""
        ranked = sorted(ids, key=lambda id: hashlib.sha256(id.encode()).digest())
        chosen = set(ranked[:NUM_PROBES])
        return [row for row in self.inputs.train if row.id in chosen]

    def _log(self, kind: str, t: int, entry: dict) -> None:
        if launch.is_main():
            self.recorder.log({"kind": kind, "t": t} | entry)

    def _measure(self, model: Artifact, reference: Artifact | None) -> dict[str, dict]:
        """Every suite of the evaluation on one model; `reference` is its step's."""
        bench, held_out = self.inputs.bench, self.inputs.held_out
        initial = self.inputs.initial
        data = {
            "policy": lambda: bench.logprobs(model, held_out),
            "reference": lambda: bench.logprobs(reference, held_out) if reference else None,
            "initial": lambda: bench.logprobs(initial, held_out) if model.key != initial.key else None,
            "lengths": lambda: np.array([(len(row.chosen), len(row.rejected)) for row in held_out]).reshape(-1, 2),
            "sources": lambda: [self.inputs.pairs[row.id].source for row in held_out],
            "model": lambda: model,
            "initial_model": lambda: initial,
            "exam": lambda: self.inputs.exam,
            "bench": lambda: bench,
        }
        measures: dict[str, dict] = {}
        for settings in self.config.evaluate.values():
            suite = choose(evaluate, settings)
            measures |= suite(*(data[name]() for name in needs(suite)))
        return measures

    def _reference_statistics(self, step: Step, beta: float) -> dict[str, float | None]:
        """gamma_ref on the whole chunk; at the step's end, on the chunk's probes: lambda (the weight of a pair in
        DPO's gradient), its spread, and the leverage, its mean distance from what it were with S as reference."""
        names = (
            "gamma_ref_mean",
            "gamma_ref_negative_share",
            "lambda_mean",
            "lambda_std",
            "reference_leverage",
        )
        if step.reference is None:
            return dict.fromkeys(names)
        gamma_ref = _gamma(step.reference_N2)
        ids = [row.id for row in step.chunk.rows]
        probes = self.probes(ids)
        reference = gamma_ref[[ids.index(row.id) for row in probes]]
        policy, initial = (
            _gamma(self.inputs.bench.logprobs(model, probes)) for model in (step.model, self.inputs.initial)
        )
        weight = 1 / (1 + np.exp(beta * (policy - reference)))
        under_initial = 1 / (1 + np.exp(beta * (policy - initial)))
        leverage = np.abs(weight - under_initial)
        values = (gamma_ref.mean(), (gamma_ref < 0).mean(), weight.mean(), weight.std(), leverage.mean())
        return dict(zip(names, map(float, values), strict=True))


def _gamma(logps: np.ndarray) -> np.ndarray:
    return logps[:, 0].astype(np.float64) - logps[:, 1]
