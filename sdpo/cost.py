"""What a step costs before it is trained: floating-point operations, and the GPU-hours that they take.

A token costs 2 N operations on its way forwards through N weights, and 6 N there and back (4 N where only adapters
are trained). So E epochs against a frozen reference cost (6 E + 2) N per unique token; attention, a few per cent
more, is left out.
"""

import math
from dataclasses import asdict
from functools import cache
from itertools import pairwise

import numpy as np
from safetensors import safe_open

from sdpo import lab, models
from sdpo.config import Config, LabModel
from sdpo.fit import Chunk, updates
from sdpo.packing import tokens_of
from sdpo.store import Artifact
from sdpo.windows import Windows

GPU, GPUS = "A100-80", 8
PEAK = 312e12  # its bf16 operations per second
UTILISATION = 0.4  # the share of them that training is reckoned to reach


def gpu_hours(flops: float) -> float:
    """Hours of one GPU."""
    return flops / (PEAK * UTILISATION) / 3600


def of_step(config: Config, chunk: Chunk, windows: Windows, initial: Artifact) -> float:
    """Operations of a step: its epochs, and every pass of a window's reference; nan where a model's size is unknown.

    The first window's reference reads the whole chunk, those of later windows the pairs of their updates.
    """
    size = parameters(config, initial)
    tokens_N = np.array([tokens_of(row) for row in chunk.rows])
    there_and_back = 4 if config.tune["name"] == "lora" else 6
    trained = there_and_back * size * config.optim.epochs * tokens_N.sum()
    if not windows.listed:
        return float(trained)
    plan = updates(len(chunk.rows), config.optim, config.seed)
    begins = np.cumsum([window["num_updates"] for window in windows.listed])
    moved = sum(tokens_N[np.unique(np.concatenate(plan[a:b]))].sum() for a, b in pairwise(begins))
    first = _external(config, windows) if config.reference["name"] == "external" else size
    return float(trained + 2 * first * tokens_N.sum() + 2 * size * moved)


def parameters(config: Config, initial: Artifact) -> float:
    """How many weights S has: counted where it exists or can be built, else what the configuration says, else nan."""
    if any(initial.folder.glob(models.WEIGHTS)):
        return _counted(initial)
    if config.model.name == "lab":
        return _built(**asdict(config.model.lab))
    return config.model.parameters or math.nan


@cache
def _built(**lab_model: int) -> int:
    """The weights of a laboratory's model, which is built to count them."""
    return sum(weights.numel() for weights in lab.new_model(LabModel(**lab_model), seed=0).parameters())


def _external(config: Config, windows: Windows) -> float:
    found = windows.first and any(windows.first.folder.glob(models.WEIGHTS))
    return _counted(windows.first) if found else config.reference["parameters"] or math.nan


def _counted(model: Artifact) -> float:
    """The weights in a model's files, of which only the headers are read."""
    total = 0
    for path in model.folder.glob(models.WEIGHTS):
        with safe_open(path, framework="np") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total
