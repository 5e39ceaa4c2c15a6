"""What a run learns of its models while they are in memory: measures and reference statistics."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sdpo.binding import choose, needs
from sdpo.config import Config
from sdpo.data.tokenize import response_lengths
from sdpo.evals import suites
from sdpo.launch import local as launch
from sdpo.metrics import Recorder
from sdpo.store import Artifact
from sdpo.train import gradient_weight
from sdpo.train.setup import Inputs
from sdpo.train.step import Step
from sdpo.variants import loss as losses


class Measured(NamedTuple):
    """A model, the step that made it (None for S), and what was measured on it."""

    model: Artifact
    step: Step | None
    eval: dict[str, dict]
    told: list[dict]  # what suites say besides numbers: answers, with how they were decoded
    summary: dict | None  # the step's entry in summary.json, less its eval


class Evidence:
    """Gathers what is known of M_0 .. M_t, and logs it."""

    def __init__(self, inputs: Inputs, config: Config, recorder: Recorder | None):
        self.inputs, self.config, self.recorder = inputs, config, recorder
        self.measured: list[Measured] = []

    def add_initial(self) -> None:
        """Measure S."""
        measures, told = self._measure(self.inputs.initial, None)
        self._log_evaluation(0, measures, told)
        self.measured.append(Measured(self.inputs.initial, None, measures, told, None))

    def add(self, t: int, step: Step, config: Config, seconds: float) -> None:
        """Log a step that was trained or found (`config` has its overrides), and measure its model."""
        for entry in step.entries:
            self._log("train", t, entry)
        measures, told = self._measure(step.model, step.reference)
        curve = [entry["loss"] for entry in step.entries]
        summary = {
            "t": t,
            "num_pairs": len(step.chunk.rows),
            "sources": dict(Counter(self.inputs.pairs[row.id].source for row in step.chunk.rows)),
            "first_loss": curve[0],
            "last_loss": float(np.mean(curve[-max(1, len(curve) // 10) :])),
            **self._reference_statistics(step, choose(losses, config.loss)),
            **step.speed._asdict(),
            "reused": step.model.reused,
            "seconds": seconds,
        }
        self._log("step", t, summary)
        self._log_evaluation(t, measures, told)
        self.measured.append(Measured(step.model, step, measures, told, summary))

    def _log_evaluation(self, t: int, measures: dict[str, dict], told: list[dict]) -> None:
        self._log("eval", t, {"eval": measures})
        for said in told:
            self._log("answers", t, said)

    def _log(self, kind: str, t: int, entry: dict) -> None:
        if launch.is_main():
            self.recorder.log({"kind": kind, "t": t} | entry)

    def _measure(self, model: Artifact, reference: Artifact | None) -> tuple[dict[str, dict], list[dict]]:
        """Every suite of the evaluation on one model, and what they tell; `reference` is its step's."""
        bench, held_out = self.inputs.bench, self.inputs.held_out
        told: list[dict] = []
        initial = self.inputs.initial
        data = {
            "policy": lambda: bench.logprobs(model, held_out),
            "reference": lambda: bench.logprobs(reference, held_out) if reference else None,
            "initial": lambda: bench.logprobs(initial, held_out) if model.key != initial.key else None,
            "lengths": lambda: response_lengths(held_out),
            "sources": lambda: [self.inputs.pairs[row.id].source for row in held_out],
            "model": lambda: model,
            "initial_model": lambda: initial,
            "exam": lambda: self.inputs.exam,
            "bench": lambda: bench,
            "tell": lambda: told.append,
        }
        measures: dict[str, dict] = {}
        for settings in self.config.evaluate.values():
            suite = choose(suites, settings)
            measures |= suite(*(data[name]() for name in needs(suite)))
        return measures, told

    def _reference_statistics(self, step: Step, loss: Callable) -> dict[str, float | None]:
        """gamma_ref on the whole chunk; at the step's end, on the chunk's probes: lambda (see lambdas), its spread, and
        the leverage, its mean distance from what it were with S as reference. None where there is no such thing."""
        names = ("gamma_ref_mean", "gamma_ref_negative_share", "lambda_mean", "lambda_std", "reference_leverage")
        if step.reference is None:
            return dict.fromkeys(names)
        gamma_ref = step.reference_N2[:, 0].astype(np.float64) - step.reference_N2[:, 1]
        values = [gamma_ref.mean(), (gamma_ref < 0).mean()]
        lambda_N, under_initial_N = self._lambdas(step, loss)
        if lambda_N is not None:
            values += [lambda_N.mean(), lambda_N.std(), np.abs(lambda_N - under_initial_N).mean()]
        return dict.fromkeys(names) | dict(zip(names, map(float, values), strict=False))

    def _lambdas(self, step: Step, loss: Callable) -> list[np.ndarray | None]:
        """lambda of the chunk's probes at the step's end: with its reference, and with S in its place."""
        ids = [row.id for row in step.chunk.rows]
        probes = self.inputs.probes(ids)
        where = [ids.index(row.id) for row in probes]
        policy, initial = (self.inputs.bench.logprobs(model, probes) for model in (step.model, self.inputs.initial))
        rest = {"lengths": response_lengths(probes), "ratings": step.chunk.ratings_N2[where]}
        references = (step.reference_N2[where], initial)
        return [gradient_weight.of_pairs(loss, policy=policy, reference=reference, **rest) for reference in references]
