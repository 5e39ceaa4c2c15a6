"""What a run needs: memory of each GPU and node, disk, and the time that every step costs whatever its pairs.

P is the number of weights, A of those that are trained (P, or about P / 100 with adapters), N of ranks, and w the bytes
of a weight in a forward pass: 2 in bf16, 4 in fp32, 0.55 in 4 bits. A gradient takes 4 bytes, AdamW's moments 8, and a
master 4 (none in fp32 without ZeRO, where the weights are the masters). A moment in 8 bits takes 1 byte and 4 / 256 of
a scale. Activations follow from the tokens of a micro-batch, which are halved until it fits.
"""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from sdpo import distributed
from sdpo.binding import bind, inputs_of
from sdpo.config import TRAINED, Config, Launch
from sdpo.console import tell
from sdpo.model import hub
from sdpo.variants import loss as losses

GB = 1e9
GPU_MEMORY = 80.0  # GB, of a GPU that is not known
DISK = 1e9  # bytes per second, assumed
ADAPTERS = 0.01  # trained weights per frozen one, assumed
STAGES = {"off": None, "zero1": 1, "zero2": 2, "zero3": 3}
STATES = ("fp32", "host", "8bit")  # in the order in which auto tries them: the first two are exact
SHARE = 0.95  # of a GPU's memory that can be planned; the rest is for CUDA, its libraries and fragments
LAYER, INPUTS = 42, 2  # bytes of activations per token and unit of width in a layer, and of those that are its inputs
OWN_GROUPS, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
HEAD = 2 * GB  # logits of the smallest tile and what the head keeps for them, assumed


class Size(NamedTuple):
    """What decides a run's needs besides its stage."""

    weights: float  # of S
    reference: float  # of the largest model that only scores
    ranks: int
    nodes: int
    precision: str
    save_dtype: str
    adapters: bool
    quantized: bool
    offload: bool
    states: str
    carries: bool  # whether every finished step keeps its moments
    pair: int  # tokens of the longest pair
    pack: int  # tokens of a micro-batch
    recompute: bool
    beside: bool = False  # whether the reference is in memory while the policy trains

    @classmethod
    def of(cls, config: Config, weights: float, reference: float) -> "Size":
        """The size of a run; `weights` and `reference` are numbers of weights."""
        launch, tune = config.launch, config.tune
        return cls(
            weights,
            reference,
            launch.ranks,
            launch.nodes,
            config.precision,
            config.save_dtype,
            adapters=tune["name"] == "lora",
            quantized=tune.get("quantize", "none") != "none",
            offload=config.deepspeed.offload,
            states=config.optim.states,
            carries=config.optim.moments == "carry",
            pair=2 * config.data.max_tokens,
            pack=launch.tokens_per_pack or TRAINED["cpu" if launch.device == "cpu" else "cuda"],
            recompute=launch.recompute_activations,
            beside="divergence" in inputs_of(bind(losses, config.loss)),
        )

    def per_gpu(self, stage: int | None) -> float:
        """The bytes that the larger of training and scoring keeps on each GPU, besides activations."""
        return max(self.training(stage), self.scoring(stage))

    def needed(self, stage: int | None) -> float:
        """The bytes that a GPU must have: those of scoring, or of training with the least activations."""
        least = self.activations(self.pair, recompute=True)  # the longest pair alone
        return max(self.training(stage) + least, self.scoring(stage))

    def scoring(self, stage: int | None) -> float:
        """w P of the largest model; under ZeRO-3 w P / N, and the layers that are gathered: 3 GB, at most w P."""
        whole = self._bytes_per_weight * max(self.weights, self.reference)
        if stage == 3:
            return min(3 * GB, whole) + (0 if self.offload else whole / self.ranks)
        return whole

    def training(self, stage: int | None) -> float:
        """The bytes of weights, masters, gradients, moments and DeepSpeed's buffers.

        off    w P      16 A in bf16, 12 A in fp32; optim.states=8bit: 6 A less; host: 4 A
        zero1  w P      4 A + 16 A / N      buffers: 1 GB, at most 5 A
        zero2  w P      20 A / N            buffers: 1 GB, at most 5 A
        zero3  w P / N  16 A / N            gathered layers: 3 GB, the update: 4 GB; at most 11 P; in fp32 twice

        A reference beside the policy doubles w P. With offload, the host has masters, moments and their gradients, and
        under ZeRO-3 the weights too.
        """
        weights, trained = (2 if self.beside else 1) * self._bytes_per_weight * self.weights, self._trained
        share = trained / self.ranks
        if stage is None:
            masters = 0 if self.precision == "fp32" else 4
            return weights + {"host": 4, "8bit": 6 + 8 / 256 + masters}.get(self.states, 12 + masters) * trained
        if stage == 3:
            buffers = min(7 * GB, 11 * self.weights) * (2 if self.precision == "fp32" else 1)
            return buffers + (0 if self.offload else weights / self.ranks + 16 * share)
        moved = 0 if self.offload else 12 * share
        kept = 4 * (trained + share) if stage == 1 else (4 if self.offload else 8) * share
        return weights + kept + moved + min(1 * GB, 5 * trained)

    def activations(self, tokens: int, recompute: bool) -> float:
        """The bytes that a forward pass keeps for a backward pass in bf16, twice as much in fp32, and 2 GB at the head.

        A layer of width h keeps 42 h bytes per token: one of Mistral 7B with adapters kept 40 h on an H200, one of
        Llama 3.2 3B 41 h and of 1B 46 h, from peaks beside the other terms. If layers are recomputed, all keep 2 h and
        one 42 h. A model of P weights is taken to have P = 12 h^2 per layer and h / 128 layers, as these models have.
        """
        width = (128 / 12 * self.weights) ** (1 / 3)
        layers = width / 128
        per_token = width * (INPUTS * layers + LAYER if recompute else LAYER * layers)
        return (2 if self.precision == "fp32" else 1) * per_token * tokens + min(HEAD, 2 * self.weights)

    def on_host(self, stage: int | None) -> float:
        """The bytes that a rank keeps in host memory while it trains.

        With optim.states=host 12 A: masters and moments. With offload 16 A / N in fp32, and in bf16 4 A / N more for
        weights and for gradients that are summed in bf16; under ZeRO-3 also the rank's w P / N.
        """
        if stage is None:
            return 12 * self._trained if self.states == "host" else 0.0
        if not self.offload:
            return 0.0
        weights = self._bytes_per_weight * self.weights if stage == 3 else 0.0
        return ((16 if self.precision == "fp32" else 20) * self._trained + weights) / self.ranks

    def per_node(self, stage: int | None) -> float:
        """The bytes of host memory on each node, besides weights that are mapped from files and shared by its ranks.

        At a step's end rank 0 has all weights in fp32, and in save_dtype (4 P, and 2 P in bf16), beside what its ranks
        keep.
        """
        saving = (6 if self.save_dtype == "bf16" else 4) * self.weights
        return self.on_host(stage) * self.ranks / self.nodes + saving

    @property
    def stages(self) -> dict[str, int | None]:
        """The stages that a run can use, by the option of `deepspeed`, from the fastest to the smallest."""
        if self.quantized or self.states in ("host", "8bit"):
            return {"off": None}
        return {name: stage for name, stage in STAGES.items() if stage != 1 or self.precision == "fp32"}

    @property
    def step_on_disk(self) -> float:
        """The bytes of a finished step: its weights, whole and in `save_dtype`; moments that are carried, 8 A."""
        return self._saved + (8 * self._trained if self.carries else 0)

    @property
    def checkpoint(self) -> float:
        """The bytes of the checkpoints of a step: masters and moments, 12 A (6 A in 8 bits). Two stay, and for a moment
        there are three.
        """
        return 3 * (6 if self.states == "8bit" else 12) * self._trained

    @property
    def fixed_seconds(self) -> float:
        """Seconds of every step: the start is read twice, hashed and loaded; M_t is written and hashed."""
        return 4 * self._saved / DISK

    @property
    def _saved(self) -> float:
        return (2 if self.save_dtype == "bf16" else 4) * self.weights

    @property
    def _trained(self) -> float:
        return (ADAPTERS if self.adapters else 1) * self.weights

    @property
    def _bytes_per_weight(self) -> float:
        return 0.55 if self.quantized else 4 if self.precision == "fp32" else 2


def limit(launch: Launch) -> float:
    """The bytes of memory of a GPU: as configured, as the card has, or 80 GB."""
    import torch

    if launch.memory is None and torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return GB * (launch.memory or GPU_MEMORY)


def with_states(config: Config) -> Config:
    """The configuration with optim.states=auto resolved for this machine; a line names any choice but fp32.

    Only a run on one GPU without DeepSpeed has a choice: more ranks divide the states with DeepSpeed.
    """
    if config.optim.states != "auto":
        return config
    states, alone = "fp32", config.launch.ranks == 1 and config.deepspeed.stage is None
    if alone and config.model.name != "lab" and distributed.device(config.launch.device).type == "cuda":
        on_hub, remote = config.model.name == "hub", config.model.trust_remote_code
        folder = hub.locate(config.model.path, config.model.revision, on_hub, remote)
        size, memory = Size.of(config, hub.count_weights(folder), 0), limit(config.launch)
        states = chosen_states(size, config.deepspeed.stage, memory, host_memory())
        if states != "fp32":
            tell(sentence(size, states, memory))
    return having(config, states)


def having(config: Config, states: str) -> Config:
    """The configuration with these states of the optimiser."""
    return replace(config, optim=replace(config.optim, states=states))


def chosen_states(size: Size, stage: int | None, limit: float, host: float = math.inf) -> str:
    """What optim.states is: as set, or for auto the first of STATES that fits into a GPU and a node; else fp32."""
    if size.states != "auto":
        return size.states
    if stage is None and size.ranks == 1:
        for states in STATES:
            tried = size._replace(states=states)
            is_there = states != "8bit" or find_spec("bitsandbytes") is not None
            if is_there and tried.needed(None) <= SHARE * limit and tried.per_node(None) <= SHARE * host:
                return states
    return "fp32"


def sentence(size: Size, states: str, limit: float) -> str:
    """What `auto` chose, and why."""
    whole, less = (size._replace(states=name).needed(None) / GB for name in ("fp32", states))
    return (
        f"optim.states=auto is {states} here: training needs {whole:.3g} GB of a GPU of {limit / GB:.3g} GB with fp32, "
        f"{less:.3g} GB with {states}; set optim.states={states} to have the same on any GPU"
    )


def host_memory() -> float:
    """The bytes of memory of this machine, or of the control groups that bound this process, such as a job's."""
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for bound in _bounds():
        with suppress(OSError, ValueError):  # there is no such file, or it says "max"
            memory = min(memory, float(bound.read_text()))
    return memory


def _bounds() -> Iterator[Path]:
    """The files that say how much this process's control group, and every one above it, may use."""
    for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):  # version 2, or 1
            root, name = (CGROUPS / controllers, "memory.limit_in_bytes" if controllers else "memory.max")
            group = root / path.lstrip("/")
            yield from (folder / name for folder in (group, *group.parents) if folder.is_relative_to(root))
