"""A reference that moves inside a step (TR-DPO): at a window's start its log-probs for just the window's pairs are
computed with the one model in memory, then its weights are put away again on the host.

Shape suffixes: N pairs of the chunk; columns are the chosen and the rejected response.
"""

import numpy as np
import torch

from sdpo.engine import Engine
from sdpo.logprobs import score
from sdpo.tokens import TokenPair

Weights = dict[str, torch.Tensor]


class MovingReference:
    """The log-probs that a step's loss reads, window by window.

    `windows` are the rule's, the first of which is already scored: `logps_N2` are its log-probs of the whole chunk.
    """

    def __init__(self, windows: list[dict], logps_N2: np.ndarray):
        self.logps_N2 = logps_N2.copy()
        ends = np.cumsum([window["num_updates"] for window in windows])
        self.begins = dict(zip(ends.tolist(), windows[1:], strict=False))  # update -> the window that begins there
        self.mixes = any("reference" in window["weights"] for window in windows)
        self.weights: Weights = {}
        self.report = [self._seen(logps_N2)] if windows else []  # per window: the height of its bound

    def begin(self, engine: Engine) -> None:
        """Keep the start's weights where later windows are mixed from them."""
        if self.mixes:
            self.weights = engine.weights(everywhere=True)

    def move(self, update: int, engine: Engine, rows: list[TokenPair], plan: list[np.ndarray], budget: int) -> None:
        """Where a window begins at this update, score its pairs under its weights."""
        if update not in self.begins:
            return
        window = self.begins[update]
        members = np.unique(np.concatenate(plan[update : update + window["num_updates"]]))
        if self.mixes:
            policy = engine.weights(everywhere=True)
            self.weights = _mix(window["weights"], {"policy": policy, "reference": self.weights})
            engine.set_weights(self.weights)
        self.logps_N2[members] = score(engine.module, [rows[i] for i in members], budget)
        if self.mixes:
            engine.set_weights(policy)
        self.report.append(self._seen(self.logps_N2[members]))

    def _seen(self, logps_N2: np.ndarray) -> dict:
        gamma_N = logps_N2[:, 0].astype(np.float64) - logps_N2[:, 1]
        return {"num_pairs": len(gamma_N), "gamma_ref_mean": float(gamma_N.mean())}

    def state(self) -> Weights:
        """What a checkpoint must keep: the policy that made these numbers is gone."""
        return {"logps": torch.from_numpy(self.logps_N2)} | {f"weights/{n}": w for n, w in self.weights.items()}

    def restore(self, state: Weights) -> None:
        self.logps_N2 = state["logps"].numpy()
        self.weights = {n.removeprefix("weights/"): w for n, w in state.items() if n.startswith("weights/")}


def _mix(coefficients: dict[str, float], sources: dict[str, Weights]) -> Weights:
    """The weighted sum of whole weights, in fp32."""
    names = next(iter(sources.values()))
    return {name: sum(c * sources[handle][name] for handle, c in coefficients.items()) for name in names}
