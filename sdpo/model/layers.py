"""How a decoder layer runs: as its model defines it, with fused kernels, compiled, or recomputed in the backward pass.

A layer's forward pass is replaced on the layer itself, and replacements nest. Only packs use fused kernels and compiled
graphs: generation and the naive check run the layer as its model defines it.
"""

import logging
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.fx.experimental import _config as symbolic_shapes
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sdpo.config import Launch
from sdpo.console import tell
from sdpo.errors import UserError
from sdpo.model.attention.interface import leave_out_of_graphs

_recomputed = partial(checkpoint, use_reentrant=False)
NO_LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}  # Liger's, which our head replaces


def kernels_of(launch: Launch, device: torch.device) -> str:
    """`liger` or `plain`: the kernels of these settings. Raises UserError if they name Liger, which cannot run here."""
    found = device.type == "cuda" and find_spec("liger_kernel") is not None and can_build()
    if launch.kernels == "liger" and not found:
        raise UserError(
            "launch.kernels=liger needs a GPU, the package liger-kernel, a C compiler and Python's headers; "
            "use launch.kernels=auto"
        )
    is_free = not launch.compile and launch.attention != "plain"
    return "liger" if found and is_free and launch.kernels != "plain" else "plain"


def can_build() -> bool:
    """Whether there is what Triton builds the start of its kernels with: a C compiler and Python's headers."""
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    headers = Path(sysconfig.get_path("include", "posix_prefix"))
    return any(map(shutil.which, compilers)) and (headers / "Python.h").is_file()


def prepare(model: PreTrainedModel, launch: Launch, device: torch.device) -> str:
    """Compile the layers or give them fused kernels, as the settings say. Returns one word or clause about it.

    Raises UserError if launch.kernels=liger names kernels that Liger does not have.
    """
    if launch.compile:
        compile_layers(model)
        return "compiled"
    if kernels_of(launch, device) == "plain":
        lacks = device.type == "cuda" and launch.kernels == "auto" and not can_build()
        return "plain, because Triton finds no C compiler or no Python.h" if lacks else "plain"
    if fuse(model):
        return "liger"
    unknown = f"liger-kernel does not know the type {model.config.model_type}"
    if launch.kernels == "liger":
        raise UserError(f"launch.kernels=liger: {unknown}; use launch.kernels=auto")
    return f"plain, because {unknown}"


def fuse(model: PreTrainedModel) -> bool:
    """Let packs run through Liger's RMSNorm, rotary embedding and SwiGLU. Returns whether Liger knows the model's type.

    Liger changes modules, and functions of transformers for the whole process. All of this is undone, and only done
    again while a layer runs. Raises UserError if Liger does not fit this release of transformers.
    """
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # it warns of backends that are not installed
    from liger_kernel.transformers import monkey_patch as liger

    file, known = type(model).__module__, liger.MODEL_TYPE_TO_APPLY_LIGER_FN
    if model.config.model_type not in known or not file.startswith("transformers."):
        return False
    places = {name: vars(module) for name, module in model.named_modules()}
    functions, before = vars(sys.modules[file]), {name: dict(place) for name, place in places.items()}
    functions_before = dict(functions)
    try:
        liger._apply_liger_kernel_to_instance(model, **NO_LOSSES)
    except (AttributeError, ImportError, TypeError) as error:
        raise UserError(
            f"liger-kernel cannot change {type(model).__name__} ({error}): use launch.kernels=plain"
        ) from error
    changes = {name: changed for name, place in places.items() if (changed := _undo(place, before[name]))}
    shared = {name: x for name, x in _undo(functions, functions_before).items() if isinstance(x, FunctionType)}
    for prefix, layer in _layers(model).items():
        own = {name.removeprefix(f"{prefix}."): x for name, x in changes.items() if name.startswith(f"{prefix}.")}
        layer.forward = _Forward(layer, partial(_fused, functions, shared, own))
    return True


def compile_layers(model: nn.Module) -> None:
    """Let torch.compile build graphs, which all layers share and which are valid for all lengths of packs.

    Attention is left out of them. How long it took is told when the next layer runs. PyTorch keeps compiled graphs in
    the folder TORCHINDUCTOR_CACHE_DIR, and in /tmp if this is not set.
    """
    leave_out_of_graphs()
    symbolic_shapes.use_duck_shape = False  # the first pack may have as many tokens as the hidden size
    clock = _clock()
    for layer in _layers(model).values():
        layer.forward = _Forward(layer, partial(_run_compiled, clock))


def recompute_activations(model: nn.Module) -> None:
    """Keep only the inputs of each layer and recompute the layer in the backward pass. Gradients stay the same.

    Done twice, it does nothing more. Raises UserError, which names the model, if none of its modules is a transformers
    GradientCheckpointingLayer.
    """
    layers = _layers(model)
    if not layers:
        raise UserError(f"{type(model).__name__} has no layers to recompute: lower launch.tokens_per_pack instead")
    for layer in layers.values():
        if getattr(layer.forward, "caller", None) is not _recomputed:
            layer.forward = _Forward(layer, _recomputed)


class _Forward:
    """A layer's forward pass, called by another function. It holds the layer weakly: no layer outlives its engine."""

    def __init__(self, layer: nn.Module, caller: Callable):
        present = vars(layer).get("forward")
        self.function = partial(caller, present.function if present else type(layer).forward)  # takes the layer first
        self.caller, self.layer = caller, ref(layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.layer(), *args, **kwargs)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)}


class _Clock:
    """The seconds in which PyTorch compiled, since they were last told."""

    def __init__(self) -> None:
        self.began = self.seconds = 0.0
        torch._dynamo.on_compile_start(self._begin)
        torch._dynamo.on_compile_end(self._end)

    def _begin(self, *_arguments: Any) -> None:
        self.began = time.monotonic()

    def _end(self, *_arguments: Any) -> None:
        self.seconds += time.monotonic() - self.began

    def tell(self) -> None:
        if self.seconds >= 1:
            tell(f"compiled the graphs of a decoder layer in {self.seconds:.0f} s")
            self.seconds = 0.0


_clock = cache(_Clock)


def _run_compiled(clock: _Clock, forward: Callable, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if "packed" not in kwargs:
        return forward(layer, *args, **kwargs)
    clock.tell()
    return _compiled(forward)(layer, *args, **kwargs)


@cache
def _compiled(forward: Callable) -> Callable:
    return torch.compile(forward, dynamic=True)


def _fused(
    functions: dict, shared: dict, changes: dict[str, dict], forward: Callable, layer: nn.Module, *args, **kwargs
) -> Any:
    """The forward pass of a layer while its modules, and functions of its file, are Liger's."""
    if "packed" not in kwargs:
        return forward(layer, *args, **kwargs)
    places = [(functions, shared)]
    for name, changed in changes.items():
        module = layer.get_submodule(name)
        bound = {key: MethodType(x, module) if isinstance(x, FunctionType) else x for key, x in changed.items()}
        places.append((vars(module), bound))
    with _replaced(places):
        return forward(layer, *args, **kwargs)


@contextmanager
def _replaced(places: list[tuple[dict, dict]]) -> Iterator[None]:
    """Context in which dictionaries have other values."""
    before = [{key: place[key] for key in values if key in place} for place, values in places]
    for place, values in places:
        place.update(values)
    try:
        yield
    finally:
        for (place, values), old in zip(places, before, strict=True):
            for key in values:
                del place[key]
            place.update(old)


def _undo(place: dict, before: dict) -> dict:
    """Give a dictionary its old values back; returns the new ones that it had. Methods become functions."""
    changed = {key: x for key, x in place.items() if key not in before or before[key] is not x}
    for key in changed:
        del place[key]
    place.update({key: before[key] for key in changed if key in before})
    return {key: x.__func__ if isinstance(x, MethodType) else x for key, x in changed.items()}
