"""Weights of adapters in a form that can be averaged: whole matrices to add to the frozen weights.

The mean of two adapters' factors is not the mean of the two adapters; the mean of their products is. `Weights` are
fp32, on the host, and named by the scorer's parameters.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sdpo.model.engine import Engine

Weights = dict[str, torch.Tensor]

A, B = ".lora_A.", ".lora_B."  # in the names of an adapter's factors


def as_whole_matrices(scorer: nn.Module, trained: Weights) -> Weights:
    """Trained weights with every pair of factors A, B replaced by the matrix scaling * B @ A that it adds to a layer.

    The matrix (of experts: all their matrices as one tensor) has the name of the frozen weight that it is added to. All
    other weights stay as they are.
    """
    whole, names = {}, {param: name for name, param in scorer.named_parameters()}
    for name, tensor in trained.items():
        if A in name:
            path, _, adapter = name.partition(A)
            layer: Any = scorer.get_submodule(path)  # peft's LoRA layer
            adapter = adapter.removesuffix(".weight")
            product = layer.scaling[adapter] * _product(layer, tensor, trained[name.replace(A, B)])
            frozen = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))
            whole[names[frozen]] = product
        elif B not in name:
            whole[name] = tensor
    return whole


def _product(layer: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """B @ A in the layout of the frozen weight; of a layer with experts (peft's ParamWrapper) for each expert."""
    if not hasattr(layer, "num_experts"):
        return (b @ a).T.contiguous() if layer.fan_in_fan_out else b @ a
    per_expert = torch.einsum(
        "ore,eri->eoi", b.unflatten(1, (-1, layer.num_experts)), a.unflatten(0, (layer.num_experts, -1))
    )
    return per_expert.mT.contiguous() if getattr(layer.get_base_layer(), "is_transposed", False) else per_expert


@contextmanager
def at_weights(engine: Engine, whole: Weights, trained: Weights) -> Iterator[None]:
    """Context in which the engine has the weights `whole`, as `as_whole_matrices` returns them; then `trained` again.

    Inside, the trained factors are zero and the matrices are added to the frozen weights.
    """
    engine.set_weights({name: whole.get(name, torch.zeros_like(tensor)) for name, tensor in trained.items()})
    with engine.deltas_added({name: delta for name, delta in whole.items() if name not in trained}):
        yield
    engine.set_weights(trained)
