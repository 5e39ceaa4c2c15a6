"""Intervals: Student's for means, Wilson's for shares, and a length-controlled win rate.

A measure is an interval in JSON: {"value", "low", "high", "n"}, with null for an undefined number.
"""

from collections.abc import Sequence
from math import isnan, nan
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, special, stats

Measure = dict[str, Any]
Measures = dict[str, Measure]  # by name

PROBABILITY = 0.95  # coverage of an interval
PRIOR = 10.0  # standard deviation in logits: the fit stays finite if one side wins every time, and else hardly changes


class Interval(NamedTuple):
    """A value with its 95 % interval; an undefined number is nan."""

    value: float
    low: float
    high: float
    n: int


def student(values: Sequence[float] | np.ndarray) -> Interval:
    """Return the mean of `values` with its Student interval, without nan values; a single value has no interval."""
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if len(known) < 2:
        return Interval(float(known[0]) if len(known) else nan, nan, nan, len(known))
    return around(float(known.mean()), float(stats.sem(known)), len(known))


def around(value: float, standard_error: float, n: int) -> Interval:
    """Return the Student interval of a mean of `n` numbers with this standard error."""
    half = float(stats.t.ppf((1 + PROBABILITY) / 2, n - 1)) * standard_error if n > 1 else nan
    return Interval(value, value - half, value + half, n)


def wilson(values: np.ndarray) -> Interval:
    """Return the share of values above 0 (zeros count half) with its Wilson score interval."""
    return of_hits(share_above(values))


def of_hits(hits: np.ndarray) -> Interval:
    """Return the share of hits (1, 0, or 1/2 for a tie) with its Wilson score interval, without nan values."""
    known = hits[~np.isnan(hits)]
    return of_share(float(known.mean()), len(known)) if len(known) else Interval(nan, nan, nan, 0)


def of_share(value: float, n: int) -> Interval:
    """Return a share of `n` items with its Wilson score interval."""
    z = float(stats.norm.ppf((1 + PROBABILITY) / 2))
    middle = (value + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (value * (1 - value) / n + z**2 / (4 * n**2)) ** 0.5
    return Interval(value, max(middle - half, 0.0), min(middle + half, 1.0), n)


def share_above(values: np.ndarray) -> np.ndarray:
    """Return 1 for each positive value, 0 for each negative one, one half for each zero and nan for each nan."""
    return (np.sign(values) + 1) / 2


def as_measure(interval: Interval) -> Measure:
    """Return an interval as a measure, which JSON can hold."""
    return {name: None if isnan(part) else part for name, part in interval._asdict().items()}


def mean(values: Sequence[float] | np.ndarray) -> Measure:
    """Return the mean of one number per pair, prompt or item as a measure; undefined if there are none."""
    return as_measure(student(values))


def share(hits: Sequence[float] | np.ndarray) -> Measure:
    """Return the share of hits (1 or True, 0 or False, 1/2 for a tie) as a measure with Wilson's interval.

    Student's interval would leave 0 to 1, and have no width if all hits are equal.
    """
    return as_measure(of_hits(np.asarray(hits, dtype=np.float64)))


def length_controlled(wins: np.ndarray, longer: np.ndarray) -> Measure:
    """Return the win rate that answers of equal length would have: AlpacaEval 2's (Dubois et al. 2404.04475) for one
    pair of models, without its term for the difficulty of each instruction.

    `wins` [N] is 1 for a win, 0 for a loss and one half for a tie; `longer` [N] is the length of the model's answer
    minus that of its opponent's. Logistic regression with a wide normal prior fits P(win) = sigmoid(theta + phi
    tanh(longer / sd(longer))). The value is sigmoid(theta), the interval that of theta +- 1.96 standard errors, which
    come from the curvature at the fit.
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
    return as_measure(Interval(value, low, high, len(wins)))
