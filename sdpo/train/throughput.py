"""How fast a step was, in tokens per second and as a share of the device's peak."""

from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from sdpo import distributed
from sdpo.config import Config, Settings
from sdpo.model import hub
from sdpo.store import Artifact

# Dense bf16 peak, operations per second, by a part of the device's name (the makers' data sheets).
PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


class Pace(NamedTuple):
    """Unique tokens that passed through the network, and the seconds that this took."""

    tokens: int
    seconds: float


class Speed(NamedTuple):
    """How fast a step was; None where that is not known."""

    tokens_per_second: float | None = None  # in its updates
    utilisation: float | None = None  # useful operations, those of the reference pass included, as a share of the peak


def speed(config: Config, num_weights: int, trained: Pace, scored: Pace) -> Speed:
    """That of a step from its updates and the reference passes that were made for it.

    What is computed twice earns nothing; of a pass that another step had paid for, neither work nor time counts.
    """
    operations = num_weights * (operations_per_weight(config.tune) * trained.tokens + 2 * scored.tokens)
    limit = peak(distributed.device(config.launch.device)) if config.precision == "bf16" else None
    seconds = (trained.seconds + scored.seconds) * distributed.world_size()
    return Speed(trained.tokens / trained.seconds, operations / seconds / limit if limit else None)


def peak(device: torch.device) -> float | None:
    """Operations per second that a GPU is sold with; None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for part, flops in PEAKS.items() if part in name), None)


def multiplied(start: Artifact, model: PreTrainedModel) -> int:
    """The weights that a token is multiplied with: all but an embedding table that is not the head as well."""
    table = model.get_input_embeddings()
    tied = table.weight is model.get_output_embeddings().weight
    return hub.count_weights(start.folder) - (0 if tied else table.num_embeddings * table.embedding_dim)


def operations_per_weight(tune: Settings) -> int:
    """Operations per token and weight of a forward and backward pass."""
    return 4 if tune["name"] == "lora" else 6
