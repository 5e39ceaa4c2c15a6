"""How fast a step was, in tokens per second and as a share of the device's peak; and how much memory was used."""

from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from sdpo import distributed
from sdpo.config import Config, Settings
from sdpo.model import hub

# Dense bf16 peak in operations per second (the makers' data sheets), by the first of these parts of the device's name.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
PEAKS |= {"A100": 312e12, "L40S": 362e12, "4090": 165e12}


class Pace(NamedTuple):
    """Unique tokens that passed through the network, and the seconds that this took."""

    tokens: int
    seconds: float


class Speed(NamedTuple):
    """How fast a step was; None if that is not known."""

    tokens_per_second: float | None = None  # in its updates
    utilisation: float | None = None  # useful operations of updates and reference passes, as a share of the peak
    runs_on_gpu: int | None = None  # that shared the GPU meanwhile, this one included: both numbers are of one of them


def speed(config: Config, num_weights: int | None, trained: Pace, scored: Pace) -> Speed:
    """The speed of a step from its updates (`trained`) and from the reference passes that were made for it (`scored`).

    Recomputed activations do not count as useful operations. If an earlier step made a reference pass, neither the
    operations nor the seconds of that pass count here.
    """
    operations = (num_weights or 0) * (operations_per_weight(config.tune) * trained.tokens + 2 * scored.tokens)
    limit = peak(distributed.device(config.launch.device)) if config.precision == "bf16" else None
    seconds = (trained.seconds + scored.seconds) * distributed.world_size()
    share = operations / seconds / limit if limit and num_weights else None
    return Speed(trained.tokens / trained.seconds, share, distributed.runs_on_gpu())


def peak(device: torch.device) -> float | None:
    """The peak of a GPU in operations per second; None if it is not in PEAKS, and for a slice of one (MIG)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if "MIG" in name:
        return None
    return next((flops for part, flops in PEAKS.items() if part in name), None)


def peak_memory(device: torch.device) -> int:
    """The most bytes used: allocated by PyTorch on a GPU since the last trial, else resident so far (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def multiplied(model: PreTrainedModel) -> int:
    """The number of weights, without those of adapters, that a token is multiplied with.

    These are all weights but the embedding table, from which rows are only looked up, unless it is the head as well;
    of experts, as many count as a token reads.
    """
    table = cast(nn.Embedding, model.get_input_embeddings())
    tied = table.weight is model.get_output_embeddings().weight
    share = hub.share_of_experts(model.config.get_text_config().to_dict())
    weights = ((name, _count(param)) for name, param in model.named_parameters() if ".lora_" not in name)
    total = round(sum(num * (share if hub.EXPERTS in name else 1) for name, num in weights))
    return total - (0 if tied else table.num_embeddings * table.embedding_dim)


def _count(param: nn.Parameter) -> int:
    """The number of weights in a parameter, which ZeRO-3 may divide over ranks, or which may have two in a byte."""
    return getattr(param, "ds_numel", param.numel()) * (2 if param.dtype == torch.uint8 else 1)


def operations_per_weight(tune: Settings) -> int:
    """Operations per token and weight of a forward and backward pass; with adapters, frozen weights get no gradient."""
    return 4 if tune["name"] == "lora" else 6
