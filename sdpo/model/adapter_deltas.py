"""What adapters add to the weights under them, as whole matrices: their mean is an adapter's, that of factors is not.

Names are those of parameters of a scorer; `Weights` are fp32 and on the host.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sdpo.model.engine import Engine

Weights = dict[str, torch.Tensor]

A, B = ".lora_A.", ".lora_B."  # in the names of an adapter's factors


def of(scorer: nn.Module, trained: Weights) -> Weights:
    """Of trained weights those that can be averaged: factors as their product, scaled as it acts, the rest as it is.

    A product stands under the name of the frozen weight that it is added to.
    """
    whole = {}
    for name, tensor in trained.items():
        if A in name:
            path, _, adapter = name.partition(A)
            layer, adapter = scorer.get_submodule(path), adapter.removesuffix(".weight")
            product = layer.scaling[adapter] * (trained[name.replace(A, B)] @ tensor)
            whole[f"{path}.base_layer.weight"] = product.T.contiguous() if layer.fan_in_fan_out else product
        elif B not in name:
            whole[name] = tensor
    return whole


@contextmanager
def acting(engine: Engine, whole: Weights, trained: Weights) -> Iterator[None]:
    """Within it the engine is at weights as `of` gives them; after it again at the `trained` ones."""
    here = {name: whole.get(name, torch.zeros_like(tensor)) for name, tensor in trained.items()}
    engine.set_weights(here)
    with engine.shifted({name: delta for name, delta in whole.items() if name not in trained}):
        yield
    engine.set_weights(trained)
