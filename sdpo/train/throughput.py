"""What a step costs before it is trained, in floating-point operations and GPU-hours, and how fast it then was.

A token costs 2 N operations on its way forwards through N weights, and 6 N there and back (4 N where only adapters
are trained). So E epochs against a frozen reference cost (6 E + 2) N per unique token; attention, a few per cent
more, is left out.
"""

import math
from dataclasses import asdict
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from sdpo import lab
from sdpo.config import Config, LabModel
from sdpo.launch import local as launch
from sdpo.model import hub
from sdpo.model.packing import tokens_of
from sdpo.store import Artifact
from sdpo.train.loop import Chunk, updates
from sdpo.train.reference_windows import Windows

# Dense bf16 peak, operations per second, by a part of the device's name (the makers' data sheets).
PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
GPU, GPUS = "A100-80", 8
PEAK = PEAKS["A100"]
UTILISATION = 0.4  # the share of them that training is reckoned to reach


class Pace(NamedTuple):
    """Unique tokens that passed through the network, and the seconds that this took."""

    tokens: int
    seconds: float


class Speed(NamedTuple):
    """How fast a step was; None where that is not known."""

    tokens_per_second: float | None = None  # in its updates
    utilisation: float | None = None  # useful operations, those of the reference pass included, as a share of the peak


def gpu_hours(flops: float) -> float:
    """Hours of one GPU."""
    return flops / (PEAK * UTILISATION) / 3600


def of_step(config: Config, chunk: Chunk, windows: Windows, initial: Artifact) -> float:
    """Operations of a step: its epochs, and every pass of a window's reference; nan where a model's size is unknown.

    The first window's reference reads the whole chunk, those of later windows the pairs of their updates and what the
    step follows.
    """
    size = parameters(config, initial)
    tokens_N = np.array([tokens_of(row) for row in chunk.rows])
    trained = _there_and_back(config) * size * config.optim.epochs * tokens_N.sum()
    plan, every = updates(len(chunk.rows), config.optim, config.seed), config.probe.every
    num_looks = len(windows.listed[1:]) + ((len(plan) - 1) // every if every else 0)
    trained += 2 * size * num_looks * sum(map(tokens_of, chunk.probes))
    if not windows.listed:
        return float(trained)
    begins = np.cumsum([window["num_updates"] for window in windows.listed])
    moved = sum(tokens_N[np.unique(np.concatenate(plan[a:b]))].sum() for a, b in pairwise(begins))
    first = _external(config, windows) if config.reference["name"] == "external" else size
    return float(trained + 2 * first * tokens_N.sum() + 2 * size * moved)


def speed(config: Config, num_weights: int, trained: Pace, scored: Pace) -> Speed:
    """That of a step from its updates and the reference passes that were made for it.

    What is computed twice earns nothing; of a pass that another step had paid for, neither work nor time counts.
    """
    operations = num_weights * (_there_and_back(config) * trained.tokens + 2 * scored.tokens)
    limit = peak(launch.device(config.launch.device)) if config.precision == "bf16" else None
    seconds = (trained.seconds + scored.seconds) * launch.world_size()
    return Speed(trained.tokens / trained.seconds, operations / seconds / limit if limit else None)


def peak(device: torch.device) -> float | None:
    """Operations per second that a GPU is sold with; None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for part, flops in PEAKS.items() if part in name), None)


def multiplied(start: Artifact, model: PreTrainedModel) -> int:
    """The weights that a token is multiplied with: all but an embedding table that is not the head as well."""
    table = model.get_input_embeddings()
    tied = table.weight is model.get_output_embeddings().weight
    return _counted(start) - (0 if tied else table.num_embeddings * table.embedding_dim)


def parameters(config: Config, initial: Artifact) -> float:
    """How many weights S has: counted where it exists or can be built, else what the configuration says, else nan."""
    if any(initial.folder.glob(hub.WEIGHTS)):
        return _counted(initial)
    if config.model.name == "lab":
        return _built(**asdict(config.model.lab))
    return config.model.parameters or math.nan


def _there_and_back(config: Config) -> int:
    """Operations per token and weight of a forward and backward pass."""
    return 4 if config.tune["name"] == "lora" else 6


@cache
def _built(**lab_model: int) -> int:
    """The weights of a laboratory's model, which is built to count them."""
    return sum(weights.numel() for weights in lab.new_model(LabModel(**lab_model), seed=0).parameters())


def _external(config: Config, windows: Windows) -> float:
    found = windows.first and any(windows.first.folder.glob(hub.WEIGHTS))
    return _counted(windows.first) if found else config.reference.get("parameters") or math.nan


def _counted(model: Artifact) -> int:
    """The weights in a model's files, of which only the headers are read."""
    total = 0
    for path in hub.weight_files(model.folder):
        with safe_open(path, framework="np") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total
