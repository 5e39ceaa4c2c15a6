"""A measure is {"value", "low", "high", "n"}: a mean with its 95 % interval, null where undefined."""

import numpy as np
from scipy import optimize, special, stats

Measures = dict[str, dict]

PRIOR = 10.0  # standard deviation, in logits: keeps the fit of one-sided wins finite and hardly moves any other


def mean(values: np.ndarray | None) -> dict:
    """The mean of one number per pair, prompt or item with its Student interval (null for a single value)."""
    if values is None or len(values) == 0:
        return {"value": None, "low": None, "high": None, "n": 0}
    values, n = np.asarray(values, dtype=np.float64), len(values)
    value = float(np.mean(values))
    if n == 1:
        return {"value": value, "low": None, "high": None, "n": n}
    half = float(stats.t.ppf(0.975, n - 1) * stats.sem(values))
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def share_above(values: np.ndarray) -> np.ndarray:
    """1 where positive, 0 where negative, one half for a tie."""
    return (values > 0) + 0.5 * (values == 0)


def length_controlled(wins: np.ndarray, longer: np.ndarray) -> dict:
    """The win rate as it would be between answers of one length: AlpacaEval 2's (Dubois et al. 2404.04475) for one
    pair of models, without its term for the difficulty of each instruction.

    P(win) = sigmoid(theta + phi tanh(longer / sd(longer))) is fitted to wins (1, 0, one half for a tie) by logistic
    regression under a wide normal prior; `longer` is by how much the winner's answers exceed the other's. The value
    is sigmoid(theta), its interval that of theta +- 1.96 standard errors (from the curvature at the fit).
    """
    spread = float(np.std(longer)) or 1.0
    inputs_N2 = np.stack([np.ones(len(wins)), np.tanh(longer / spread)], axis=1)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = inputs_N2 @ weights
        value = np.sum(np.logaddexp(0, logits) - wins * logits) + weights @ weights / (2 * PRIOR**2)
        return value, inputs_N2.T @ (special.expit(logits) - wins) + weights / PRIOR**2

    theta, phi = optimize.minimize(loss, np.zeros(2), jac=True, method="BFGS", options={"gtol": 1e-6}).x
    chance = special.expit(inputs_N2 @ (theta, phi))
    curvature = (inputs_N2.T * (chance * (1 - chance))) @ inputs_N2 + np.eye(2) / PRIOR**2
    half = 1.96 * np.linalg.inv(curvature)[0, 0] ** 0.5
    value, low, high = (float(special.expit(at)) for at in (theta, theta - half, theta + half))
    return {"value": value, "low": low, "high": high, "n": len(wins)}
