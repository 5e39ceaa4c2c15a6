"""The reference log-probs that a step's loss reads, window by window.

The first window is scored before the step trains. If the reference moves inside the step (TR-DPO), a later window is
scored when it begins: the model in memory gets the window's weights, scores the pairs of the window, and gets the
policy's weights back.

Shape suffixes: N pairs of the chunk; columns are the chosen and the rejected response.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from sdpo.binding import bind
from sdpo.model import hub
from sdpo.model.engine import Engine
from sdpo.model.logprobs import score
from sdpo.model.lora import deltas
from sdpo.model.lora.deltas import Weights
from sdpo.train.probes import Probes
from sdpo.train.reference_windows import Windows
from sdpo.train.runner import Runner
from sdpo.train.step_key import StepSpec
from sdpo.variants import placebo as placebos

Placebo = Callable[[np.ndarray, np.ndarray], np.ndarray]  # positions, the rule's log-probs there -> what the loss reads
HashFirst = Callable[[], str | None]  # the hash of the first window's weights, on rank 0


class ReferenceLogprobs:
    """The log-probs that a step's loss reads; `logps_N2` holds those of the present window.

    `first_N2` are the log-probs of the whole chunk under the first window's model. `hash_first` returns the hash of its
    weights; only the report calls it, because the store may still be writing that model before. A `placebo` replaces
    the log-probs of every window. `probes` are scored under every later window too.
    """

    def __init__(
        self, windows: list[dict], first_N2: np.ndarray, hash_first: HashFirst, probes: Probes, placebo: Placebo
    ):
        self.placebo, self.probes, self._hash_first = placebo, probes, hash_first
        self.logps_N2 = placebo(np.arange(len(first_N2)), first_N2).copy()
        ends = np.cumsum([window["num_updates"] for window in windows])
        self.begins = dict(zip(ends.tolist(), windows[1:], strict=False))  # update -> the window that begins there
        self.bound: float | None = windows[-1].get("bound") if windows else None
        self.mixes = any("reference" in window["weights"] for window in windows)
        self.weights: Weights = {}  # the reference's, if later windows are mixed from them
        self._report = [_describe(0, None, self.logps_N2)] if windows else []  # per window so far

    @property
    def report(self) -> list[dict]:
        """What every window so far was; JSON."""
        for window in self._report[:1]:
            window["weights_hash"] = window["weights_hash"] or self._hash_first()
        return self._report

    def keep_start(self, engine: Engine) -> None:
        """Keep the weights of the step's start if later windows are mixed from them."""
        if self.mixes:
            self.weights = deltas.as_whole_matrices(engine.scorer, engine.weights(everywhere=True))

    def see(self, distance: float, update: int, num_updates: int) -> None:
        """Begin a new window at this update if the `kl_proxy` of the last one, `distance`, exceeded the bound."""
        if self.bound is not None and distance > self.bound:
            self.begins[update] = {"num_updates": num_updates - update, "weights": {"policy": 1.0}}

    def move(self, spec: StepSpec, update: int, engine: Engine, budget: int) -> None:
        """If a window begins at this update, score the window's pairs under the window's weights."""
        if update not in self.begins:
            return
        window = self.begins[update]
        members = np.unique(np.concatenate(spec.plan[update : update + window["num_updates"]]))
        rows = [spec.chunk.rows[i] for i in members]
        with self._weights_of(window, engine):
            self.logps_N2[members] = self.placebo(members, score(engine.module, rows, budget))
            self.probes.score("reference", update, engine, budget)
        weights_hash = _hash_of_weights(engine, self.weights)
        self._report.append(_describe(update, weights_hash, self.logps_N2[members]))

    def _weights_of(self, window: dict, engine: Engine) -> AbstractContextManager:
        """A context in which the engine has the window's weights. If nothing is mixed, they are the policy's."""
        if not self.mixes:
            return nullcontext()
        trained = engine.weights(everywhere=True)
        policy = deltas.as_whole_matrices(engine.scorer, trained)
        self.weights = _mix(window["weights"], {"policy": policy, "reference": self.weights})
        return deltas.at_weights(engine, self.weights, trained)

    def state(self) -> Weights:
        """The tensors that a checkpoint must keep, because the policy that made them no longer exists."""
        kept = {"weights": self.weights, "probes": self.probes.logps}
        named = {f"{part}/{name}": tensor for part, tensors in kept.items() for name, tensor in tensors.items()}
        return {"logps": torch.from_numpy(self.logps_N2)} | named

    def restore(self, state: Weights, report: list[dict]) -> None:
        """Go on from a checkpoint; the arguments are what `state` and `report` were when it was written."""
        self._report, self.logps_N2 = report, state["logps"].numpy()
        self.weights, self.probes.logps = (
            {name.removeprefix(part): tensor for name, tensor in state.items() if name.startswith(part)}
            for part in ("weights/", "probes/")
        )


def score_first_window(spec: StepSpec, windows: Windows, placebo: Placebo, runner: Runner) -> ReferenceLogprobs:
    """Score the chunk under the first window's model, and audit a sample of it. Zeros if the loss reads no reference.

    The rows that every model of the run scores are scored too, while the model is loaded.
    """
    model, rows = windows.first, spec.chunk.rows
    probes = Probes(spec.chunk.probes, spec.config.probe.every)
    if model is None:
        zeros_N2 = np.zeros((len(rows), 2), dtype=np.float32)
        return ReferenceLogprobs(windows.listed, zeros_N2, lambda: None, probes, placebo)
    first_N2, *_ = runner.logprobs_of(model, [rows, *spec.followed])
    runner.audit(model, rows, first_N2)
    return ReferenceLogprobs(windows.listed, first_N2, lambda: runner.weights_hash(model), probes, placebo)


def bind_placebo(spec: StepSpec, runner: Runner) -> Placebo:
    """The step's placebo with S's log-probs of the chunk, for which S is loaded unless the store has them."""
    if spec.placebo == "none":
        return lambda members, rule_N2: rule_N2
    transform = bind(placebos, {"name": spec.placebo})
    initial_N2 = runner.logprobs(spec.history[0], spec.chunk.rows)
    return lambda members, rule_N2: transform(initial_N2[members], rule_N2, spec.config.seed)


def _describe(update: int, weights_hash: str | None, logps_N2: np.ndarray) -> dict:
    """A window's first update (from 1), its weights, and the mean reference margin over the window's pairs."""
    gamma_N = logps_N2[:, 0].astype(np.float64) - logps_N2[:, 1]
    margins = {"num_pairs": len(gamma_N), "gamma_ref_mean": float(gamma_N.mean())}
    return {"first_update": update + 1, "weights_hash": weights_hash, **margins}


def _hash_of_weights(engine: Engine, mixed: Weights) -> str:
    """The content hash of `mixed` weights, or else of the trained ones, in the dtype of the forward pass; on rank 0."""
    weights = {name.removeprefix("model."): tensor for name, tensor in (mixed or engine.weights()).items()}
    return hub.fingerprint_weights(weights, engine.scorer.head.weight.dtype)


def _mix(coefficients: dict[str, float], sources: dict[str, Weights]) -> Weights:
    """The weighted sum of whole weights, in fp32."""
    names, zero = next(iter(sources.values())), torch.zeros(())
    return {name: sum((c * sources[handle][name] for handle, c in coefficients.items()), zero) for name in names}
