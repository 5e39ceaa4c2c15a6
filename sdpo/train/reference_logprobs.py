"""A reference that moves inside a step (TR-DPO): at a window's start its log-probs for just the window's pairs are
computed with the one model in memory, then its weights are put away again on the host.

Shape suffixes: N pairs of the chunk; columns are the chosen and the rejected response.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from sdpo.data.tokenize import TokenPair
from sdpo.model import adapter_deltas, hub
from sdpo.model.adapter_deltas import Weights
from sdpo.model.engine import Engine
from sdpo.model.logprobs import score
from sdpo.train.probes import Probes

StandIn = Callable[[np.ndarray, np.ndarray], np.ndarray]  # members, their log-probs under the rule -> what is read


class MovingReference:
    """The log-probs that a step's loss reads, window by window.

    `windows` are the rule's, the first of which is already scored: `logps_N2` are its log-probs of the whole chunk,
    `weights_hash` says which weights gave them. Later ones are seen by the `probes` too. In every window a placebo,
    where there is one, is the `stand_in` of what the weights gave.
    """

    def __init__(
        self,
        windows: list[dict],
        logps_N2: np.ndarray,
        weights_hash: str | None,
        probes: Probes,
        stand_in: StandIn | None = None,
    ):
        self.stand_in, self.probes = stand_in or (lambda members, rule_N2: rule_N2), probes
        self.logps_N2 = self.stand_in(np.arange(len(logps_N2)), logps_N2).copy()
        ends = np.cumsum([window["num_updates"] for window in windows])
        self.begins = dict(zip(ends.tolist(), windows[1:], strict=False))  # update -> the window that begins there
        self.mixes = any("reference" in window["weights"] for window in windows)
        self.weights: Weights = {}
        self.report = [self._seen(0, weights_hash, self.logps_N2)] if windows else []  # per window

    def begin(self, engine: Engine) -> None:
        """Keep the start's weights where later windows are mixed from them."""
        if self.mixes:
            self.weights = adapter_deltas.of(engine.scorer, engine.weights(everywhere=True))

    def move(self, update: int, engine: Engine, rows: list[TokenPair], plan: list[np.ndarray], budget: int) -> None:
        """Where a window begins at this update, score its pairs under its weights."""
        if update not in self.begins:
            return
        window = self.begins[update]
        members = np.unique(np.concatenate(plan[update : update + window["num_updates"]]))
        with self._at(window, engine):
            self.logps_N2[members] = self.stand_in(members, score(engine.module, [rows[i] for i in members], budget))
            self.probes.look("reference", update, engine, budget)
        weights_hash = hash_of_weights(engine, self.weights)
        self.report.append(self._seen(update, weights_hash, self.logps_N2[members]))

    def _at(self, window: dict, engine: Engine) -> AbstractContextManager:
        """Within it the engine is at the window's weights."""
        if not self.mixes:
            return nullcontext()
        trained = engine.weights(everywhere=True)
        policy = adapter_deltas.of(engine.scorer, trained)
        self.weights = _mix(window["weights"], {"policy": policy, "reference": self.weights})
        return adapter_deltas.acting(engine, self.weights, trained)

    def _seen(self, update: int, weights_hash: str, logps_N2: np.ndarray) -> dict:
        """Where a window begins, what its weights are, and the height of its bound on its own pairs."""
        gamma_N = logps_N2[:, 0].astype(np.float64) - logps_N2[:, 1]
        height = {"num_pairs": len(gamma_N), "gamma_ref_mean": float(gamma_N.mean())}
        return {"first_update": update + 1, "weights_hash": weights_hash, **height}

    def state(self) -> Weights:
        """What a checkpoint must keep: the policy that made these numbers is gone."""
        kept = {"weights": self.weights, "probes": self.probes.looks}
        named = {f"{part}/{name}": tensor for part, tensors in kept.items() for name, tensor in tensors.items()}
        return {"logps": torch.from_numpy(self.logps_N2)} | named

    def restore(self, state: Weights) -> None:
        self.logps_N2 = state["logps"].numpy()
        self.weights, self.probes.looks = (
            {name.removeprefix(part): tensor for name, tensor in state.items() if name.startswith(part)}
            for part in ("weights/", "probes/")
        )


def hash_of_weights(engine: Engine, mixed: Weights | None = None) -> str:
    """The content hash of the weights that are trained, or mixed from them, gathered, as the forward pass reads them;
    of rank 0."""
    weights = {name.removeprefix("model."): tensor for name, tensor in (mixed or engine.weights()).items()}
    return hub.fingerprint_weights(weights, engine.scorer.head.weight.dtype)


def _mix(coefficients: dict[str, float], sources: dict[str, Weights]) -> Weights:
    """The weighted sum of whole weights, in fp32."""
    names = next(iter(sources.values()))
    return {name: sum(c * sources[handle][name] for handle, c in coefficients.items()) for name in names}
