"""What a step will cost, in floating-point operations and GPU-hours.

A forward pass through N weights costs 2 N operations per token; forward and backward pass together cost 6 N, or 4 N if
only adapters are trained. So E epochs against a frozen reference cost (6 E + 2) N operations per unique token.
Attention, a few per cent more, is left out.
"""

import math
from dataclasses import asdict
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from sdpo.config import Config, LabModel
from sdpo.lab.model import new_model
from sdpo.model import hub
from sdpo.model.packing import tokens_of
from sdpo.store.artifacts import Artifact
from sdpo.train.reference_windows import Windows
from sdpo.train.step_key import StepSpec
from sdpo.train.throughput import PEAKS, operations_per_weight

GPU = "A100-80"
PEAK = PEAKS["A100"]
UTILISATION = 0.4  # assumed share of the peak that training reaches


def gpu_hours(flops: float) -> float:
    """Hours on one GPU of the kind named above."""
    return flops / (PEAK * UTILISATION) / 3600


def flops_of_step(spec: StepSpec, windows: Windows) -> float:
    """Operations of a step: its epochs and all its reference passes; nan if the size of a model is unknown.

    The reference of the first window scores the whole chunk. Each later one scores the pairs of its window's updates
    and the probe rows. Windows that a bound ends are not foreseen.
    """
    config, chunk, plan = spec.config, spec.chunk, spec.plan
    size = count_parameters(config, spec.history[0], per_token=True)
    tokens_N = np.array([tokens_of(row) for row in chunk.rows])
    trained = operations_per_weight(config.tune) * size * config.optim.epochs * tokens_N.sum()
    every = config.probe.every
    num_probings = len(windows.listed[1:]) + ((len(plan) - 1) // every if every else 0)
    trained += 2 * size * num_probings * sum(map(tokens_of, chunk.probes))
    if not windows.listed:
        return float(trained)
    begins = np.cumsum([window["num_updates"] for window in windows.listed])
    moved = sum(tokens_N[np.unique(np.concatenate(plan[a:b]))].sum() for a, b in pairwise(begins))
    first = size
    if config.reference["name"] == "external":
        first = _count_stored(windows.first, per_token=True) or config.reference.get("parameters") or math.nan
    return float(trained + 2 * first * tokens_N.sum() + 2 * size * moved)


def count_parameters(config: Config, initial: Artifact, per_token: bool = False) -> float:
    """The number of weights of S: counted if S exists or can be built, else model.parameters, else nan.

    `per_token` counts only as many experts as a token reads, if S exists.
    """
    if config.model.name == "lab" and not initial.reused:
        return _count_built(**asdict(config.model.lab))
    return _count_stored(initial, per_token) or config.model.parameters or math.nan


@cache
def _count_built(**settings: int) -> int:
    """The number of weights of a laboratory model, counted on a model built for this purpose."""
    return sum(weights.numel() for weights in new_model(LabModel(**settings), seed=0).parameters())


def count_reference(config: Config) -> float:
    """The number of weights of an external reference: counted if it is a folder, else as given; 0 if not known."""
    rule = config.reference
    if rule["name"] != "external":
        return 0
    here = Artifact("", Path(rule["path"]), reused=True) if Path(rule["path"]).is_dir() else None
    return _count_stored(here) or rule.get("parameters") or 0


def _count_stored(model: Artifact | None, per_token: bool = False) -> int | None:
    """The number of weights of a model; None if it does not exist."""
    return hub.count_weights(model.folder, per_token) if model and any(model.folder.glob(hub.WEIGHTS)) else None
