"""Evaluates S and every M_t: runs the suites, and computes statistics of each step's reference."""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from sdpo.binding import bind, inputs_of
from sdpo.config import Config
from sdpo.data.pair_table import PairTable
from sdpo.data.tokenize import response_lengths
from sdpo.evals import suites
from sdpo.metrics import CLOCK, Recorder
from sdpo.stats import Measures
from sdpo.store.artifacts import Artifact
from sdpo.train import gradient_weight
from sdpo.train.setup import Inputs
from sdpo.train.step import Step
from sdpo.types import Scored

REFERENCE_STATISTICS = (
    "gamma_ref_mean",  # mean reference margin of the chunk's pairs
    "gamma_ref_negative_share",  # share of the chunk's pairs with a negative reference margin
    "lambda_mean",  # gradient weight of the chunk's probes at the step's end, and its spread
    "lambda_std",
    "reference_leverage",  # mean absolute change of the gradient weight if the reference were S
)


class Measured(NamedTuple):
    """A model and what was measured on it."""

    model: Artifact
    step: Step | None  # the step that made it; None for S
    chunk: np.ndarray  # the training pairs of that step
    eval: Measures
    answers: list[dict]  # what suites reported besides measures: answers to prompts, and how they were decoded
    summary: dict[str, Any]  # the step's entry in summary.json, without its eval


class Evaluator:
    """Measures S and every M_t, and logs steps and measures; `measured` holds M_0 .. M_t."""

    def __init__(self, inputs: Inputs, config: Config, recorder: Recorder | None):
        """`recorder` is None on all ranks but the first."""
        self.inputs, self.config, self.recorder = inputs, config, recorder
        self.measured: list[Measured] = []

    def add_initial(self) -> None:
        """Measure S."""
        self._evaluate(self.inputs.initial, None, np.array([], dtype=int), {})

    def add(self, step: Step, chunk: np.ndarray, seconds: float) -> None:
        """Log a step that was trained or found, and measure its model. `chunk` are its training pairs."""
        curve = [entry["loss"] for entry in step.entries]
        summary = {
            "t": step.spec.t,
            "num_pairs": len(step.spec.chunk.rows),
            "sources": dict(Counter(self.inputs.train.sources[chunk])),
            "first_loss": curve[0],
            "last_loss": float(np.mean(curve[-max(1, len(curve) // 10) :])),
            **self._reference_statistics(step),
            **step.speed._asdict(),
            "reused": step.model.reused,
            "seconds": seconds,
        }
        self.log("step", step.spec.t, summary)
        self._evaluate(step.model, step, chunk, summary)

    def log(self, kind: str, t: int, entry: dict[str, Any]) -> None:
        """Write an entry of step t to metrics.jsonl; ranks without a recorder write nothing."""
        if self.recorder:
            self.recorder.log({"kind": kind, "t": t} | entry)

    def _evaluate(self, model: Artifact, step: Step | None, chunk: np.ndarray, summary: dict[str, Any]) -> None:
        """Run every suite on one model, and log and keep what they measure and report."""
        runner, held_out, initial = self.inputs.runner, self.inputs.held_out, self.inputs.initial
        reference = step.reference if step else None
        answers: list[dict] = []

        def scored(table: PairTable) -> Scored:
            of_reference = runner.logprobs(reference, table.rows) if reference else None
            of_initial = runner.logprobs(initial, table.rows) if model.key != initial.key else None
            return Scored(runner.logprobs(model, table.rows), of_reference, of_initial, table.lengths_N2)

        data = {
            "scored": lambda: scored(held_out),
            "sources": lambda: held_out.sources,
            "sets": lambda: {name: scored(table) for name, table in self.inputs.held_out_sets.items()},
            "held_out": lambda: held_out.pairs,
            "model": lambda: model,
            "initial_model": lambda: initial,
            "exam": lambda: self.inputs.exam,
            "runner": lambda: runner,
            "t": lambda: len(self.measured),
            "report": lambda: answers.append,
        }
        measures: Measures = {}
        with CLOCK.counting("evaluation"):
            for settings in self.config.evaluate.values():
                suite = bind(suites, settings)
                measures |= suite(*(data[name]() for name in inputs_of(suite)))
        t = len(self.measured)
        self.log("eval", t, {"eval": measures})
        for entry in answers:
            self.log("answers", t, entry)
        self.measured.append(Measured(model, step, chunk, measures, answers, summary))

    def _reference_statistics(self, step: Step) -> dict[str, float | None]:
        """REFERENCE_STATISTICS of the step; those that it does not have are None."""
        values: list[float] = []
        if step.reference:
            gamma_ref_N = step.reference_N2[:, 0].astype(np.float64) - step.reference_N2[:, 1]
            values += [gamma_ref_N.mean(), (gamma_ref_N < 0).mean()]
            lambda_N, under_initial_N = self._gradient_weights(step)
            if lambda_N is not None:
                values += [lambda_N.mean(), lambda_N.std(), np.abs(lambda_N - under_initial_N).mean()]
        known = zip(REFERENCE_STATISTICS, map(float, values), strict=False)
        return dict.fromkeys(REFERENCE_STATISTICS) | dict(known)

    def _gradient_weights(self, step: Step) -> list[np.ndarray | None]:
        """Gradient weights of the step's probes at its end: against the step's reference, and against S."""
        positions = step.spec.chunk.probed
        rows = [step.spec.chunk.rows[i] for i in positions]
        policy, initial = (self.inputs.runner.logprobs(model, rows) for model in (step.model, self.inputs.initial))
        rest = {"lengths": response_lengths(rows), "ratings": step.spec.chunk.ratings_N2[positions]}
        references = (step.reference_N2[positions], initial)
        return [
            gradient_weight.of_pairs(step.spec.loss, policy=policy, reference=reference, **rest)
            for reference in references
        ]
