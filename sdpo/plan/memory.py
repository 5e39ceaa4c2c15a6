"""What a run needs: memory of each GPU and node, disk, and the time that every step costs whatever its pairs.

P is the number of weights, A of those that are trained (P, or about P / 100 with adapters), N of ranks, and w the bytes
of a weight in a forward pass: 2 in bf16, 4 in fp32, 0.55 in 4 bits. A gradient takes 4 bytes, AdamW's moments 8, and a
master 4 (none in fp32 without ZeRO, where the weights are the masters). Activations come on top: they follow from
`launch.tokens_per_pack`, which is halved until a micro-batch fits.
"""

from typing import NamedTuple

from sdpo.config import Config, Launch

GB = 1e9
GPU_MEMORY = 80.0  # GB, of a GPU that is not known
DISK = 1e9  # bytes per second, assumed
ADAPTERS = 0.01  # trained weights per frozen one, assumed
STAGES = {"off": None, "zero1": 1, "zero2": 2, "zero3": 3}


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

    @classmethod
    def of(cls, config: Config, weights: float, reference: float) -> "Size":
        """The size of a run; `weights` and `reference` are numbers of weights."""
        launch, tune = config.launch, config.tune
        shape = (launch.ranks, launch.nodes, config.precision, config.save_dtype)
        quantized = tune.get("quantize", "none") != "none"
        return cls(weights, reference, *shape, tune["name"] == "lora", quantized, config.deepspeed.offload)

    def per_gpu(self, stage: int | None) -> float:
        """The bytes that the larger of training and scoring keeps on each GPU."""
        return max(self.training(stage), self.scoring(stage))

    def scoring(self, stage: int | None) -> float:
        """w P of the largest model; under ZeRO-3 w P / N, and the layers that are gathered: 3 GB, at most w P."""
        whole = self._bytes_per_weight * max(self.weights, self.reference)
        if stage == 3:
            return min(3 * GB, whole) + (0 if self.offload else whole / self.ranks)
        return whole

    def training(self, stage: int | None) -> float:
        """The bytes of weights, masters, gradients, moments and DeepSpeed's buffers.

        off: w P + 16 A in bf16, 12 A in fp32. ZeRO-1: w P + 4 A + 12 A / N and buffers of 1 GB. ZeRO-2: w P + 20 A / N
        and buffers of 1 GB. ZeRO-3: (w P + 16 A) / N and 7 GB, 3 of them gathered layers and 4 at the update, in fp32
        twice as much. Small models have smaller buffers: 5 A, and 11 P at stage 3. With offload, the host has masters,
        moments and their gradients, and under ZeRO-3 the weights too.
        """
        weights, trained = self._bytes_per_weight * self.weights, self._trained
        share = trained / self.ranks
        if stage is None:
            return weights + (12 if self.precision == "fp32" else 16) * trained
        if stage == 3:
            buffers = min(7 * GB, 11 * self.weights) * (2 if self.precision == "fp32" else 1)
            return buffers + (0 if self.offload else weights / self.ranks + 16 * share)
        moved = 0 if self.offload else 12 * share
        kept = 4 * trained if stage == 1 else (4 if self.offload else 8) * share
        return weights + kept + moved + min(1 * GB, 5 * trained)

    def per_node(self, stage: int | None) -> float:
        """The bytes of host memory on each node.

        Every rank loads the weights in fp32 (4 P), under ZeRO with a copy of the trained ones (4 A). With offload, it
        keeps 12 A / N, and under ZeRO-3 its w P / N.
        """
        loading = 4 * self.weights + (4 * self._trained if stage else 0)
        kept = 12 * self._trained / self.ranks if self.offload and stage else 0.0
        if self.offload and stage == 3:
            kept += self._bytes_per_weight * self.weights / self.ranks
        return self.ranks / self.nodes * max(loading, kept)

    @property
    def stages(self) -> dict[str, int | None]:
        """The stages that a run can use, by the option of `deepspeed`, from the fastest to the smallest."""
        return {name: stage for name, stage in STAGES.items() if stage != 1 or self.precision == "fp32"}

    @property
    def step_on_disk(self) -> float:
        """The bytes of a finished step: its weights, whole and in `save_dtype`."""
        return (2 if self.save_dtype == "bf16" else 4) * self.weights

    @property
    def checkpoint(self) -> float:
        """The bytes of the checkpoints of a step: masters and moments, 12 A; for a moment there are two."""
        return 2 * 12 * self._trained

    @property
    def fixed_seconds(self) -> float:
        """Seconds of every step: the start is read twice, hashed and loaded; M_t is written and hashed."""
        return 4 * self.step_on_disk / DISK

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


def name_of(stage: int | None) -> str:
    """The option of `deepspeed` that a stage belongs to."""
    return next(name for name, number in STAGES.items() if number == stage)


def cheapest(size: Size, limit: float) -> str | None:
    """The fastest stage that fits into `limit` bytes per GPU; None if none does."""
    return next((name for name, stage in size.stages.items() if size.per_gpu(stage) <= limit), None)


def lines(size: Size, chosen: int | None, limit: float) -> list[str]:
    """The needs of a run as text: at every stage, and of the chosen one on its nodes and disk."""
    stages = (f"{name} {size.per_gpu(stage) / GB:.3g}" for name, stage in size.stages.items())
    reference = f" and {size.reference:.3g} of a reference" if size.reference else ""
    return [
        f"{size.weights:.3g} weights{reference}, {size.ranks} ranks on {size.nodes} nodes, {size.precision}: "
        f"GB per GPU (of {limit / GB:.3g}), besides activations: {', '.join(stages)}",
        f"  deepspeed={name_of(chosen)}: {size.per_node(chosen) / GB:.3g} GB of host memory per node; a step takes "
        f"{size.step_on_disk / GB:.3g} GB of disk, {size.checkpoint / GB:.3g} GB more while it is trained, and about "
        f"{size.fixed_seconds:.3g} s besides its updates",
    ]


def refusal(size: Size, chosen: int | None, limit: float) -> str | None:
    """Why the chosen stage cannot work, and what can; None if it fits."""
    need = size.per_gpu(chosen)
    if not need > limit:
        return None
    found = cheapest(size, limit)
    advice = f"the cheapest stage that fits is deepspeed={found}" if found else "no stage fits: use more ranks or LoRA"
    return f"deepspeed={name_of(chosen)} needs {need / GB:.3g} GB per GPU, of {limit / GB:.3g} GB; {advice}"
