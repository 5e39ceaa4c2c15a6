"""Where a sweep's runs go on this machine: to GPUs, which small models share, or to the cores.

A small model leaves most of a GPU idle, so runs share one as far as the memory suffices that the plan says they need,
and the cores that feed them. A run with FILLS weights or more has a GPU to itself.
"""

import os
from collections import Counter
from collections.abc import Sequence
from itertools import cycle, islice
from math import inf
from typing import NamedTuple

from sdpo.config import TRAINED, Config
from sdpo.errors import UserError
from sdpo.run.folder import Run
from sdpo.run.needs import GB, Size
from sdpo.run.provenance import num_cores, query_gpus

MOST_SHARING = 8  # runs on one GPU
FILLS = 1e9  # weights from which a model alone keeps a GPU busy
USABLE = 0.9  # of the free memory of a GPU; the rest is for fragments
NO_GPU = ("", "-1", "NoDevFiles")  # what CUDA_VISIBLE_DEVICES says where there is none
OVERHEAD = 3 * GB  # of a run: CUDA's context, the head's tiles, workspaces
# Small models are deeper and narrower than the plan takes them to be. SmolLM2-135M has 30 layers of width 576 and not 9
# of 1129, and keeps 1.6 times the activations.
DEPTH = 1.6


class Need(NamedTuple):
    """What a run needs of its place."""

    memory: float = 0.0  # bytes of each GPU
    alone: bool = False


class Place(NamedTuple):
    """The GPUs of a run, or the cores of this machine."""

    gpus: str  # as CUDA_VISIBLE_DEVICES names them; "" without GPUs
    most: int  # runs at a time
    memory: float  # bytes that these may take on each GPU together; infinite if nobody asks

    def has_room(self, held: Sequence[Need], need: Need) -> bool:
        """Whether one more run may start here. A place without runs takes any."""
        if not held:
            return True
        together = [*held, need]
        if len(together) > self.most or any(one.alone for one in together):
            return False
        return sum(one.memory for one in together) <= self.memory


def choose(places: Sequence[Place], held: Sequence[Sequence[Need]], need: Need) -> int | None:
    """The place with the fewest runs, and of these with the least memory in use, that has room; None if none has.

    `held` are the needs of the runs at each place.
    """
    free = [i for i, place in enumerate(places) if place.has_room(held[i], need)]
    return min(free, key=lambda i: (len(held[i]), sum(one.memory for one in held[i])), default=None)


def places_for(todo: list[Run], n: int | str) -> list[Place]:
    """All places. If `n` is a number, so many runs are done at a time, whatever memory they need."""
    launches = [one.config.launch for one in todo]
    ranks = max(asked.ranks for asked in launches)
    fitting_cores = max(1, num_cores() // max(asked.ranks * asked.threads for asked in launches))
    gpus = [] if all(asked.device == "cpu" for asked in launches) else _gpus()
    if gpus and len(gpus) < ranks:
        raise UserError(f"launch.ranks={ranks}, but there are {len(gpus)} GPUs")
    groups = [",".join(gpus[i : i + ranks]) for i in range(0, len(gpus) - ranks + 1, ranks)] or [""]
    if not isinstance(n, str):
        return [Place(group, most, inf) for group, most in Counter(islice(cycle(groups), n)).items()]
    if not gpus:
        return [Place("", fitting_cores, inf)]
    most = min(MOST_SHARING, max(1, fitting_cores // len(groups))) if ranks == 1 else 1
    return [Place(group, most, USABLE * _free_memory(group)) for group in groups]


def need(config: Config, size: Size) -> Need:
    """What a run needs of each of its GPUs. A run of several ranks, or whose size is not known, is alone there."""
    pack = config.launch.tokens_per_pack or TRAINED["cpu"]  # as sdpo.model.memory has it for runs that share a GPU
    activations = DEPTH * size.activations(pack, config.launch.recompute_activations)
    memory = size.per_gpu(config.deepspeed.stage) + activations + OVERHEAD
    return Need(memory, alone=not (memory < inf and size.weights < FILLS and size.ranks == 1))


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return query_gpus("index") or [str(index) for index in range(_count_gpus())]
    return [gpu for gpu in visible.split(",") if gpu not in NO_GPU]


def _count_gpus() -> int:
    """The number of GPUs that the driver (NVML) counts; 0 if it is not there or PyTorch cannot use them.

    `torch.cuda.device_count` would start CUDA if there is no NVML, and a process that did cannot fork.
    """
    import torch  # here, because it takes seconds

    return max(0, torch.cuda._device_count_nvml()) if torch.backends.cuda.is_built() else 0


def _free_memory(gpus: str) -> float:
    """The bytes that are free on the fullest of some GPUs; 0 if that is not known."""
    free = {}
    for line in query_gpus("index,uuid,memory.free"):
        index, uuid, memory = line.split(", ")
        if memory.endswith(" MiB"):  # else nvidia-smi does not know
            free[index] = free[uuid] = 2**20 * float(memory.removesuffix(" MiB"))
    return min(free.get(gpu, 0.0) for gpu in gpus.split(","))
