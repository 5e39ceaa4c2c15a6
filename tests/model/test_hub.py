"""Moving a model to its device and precision."""

import torch
from torch import nn

from sdpo.model.hub import cast


def test_a_cast_changes_float_parameters_alone():
    module = nn.Linear(2, 1)
    module.packed = nn.Parameter(torch.tensor([3, 200], dtype=torch.uint8), requires_grad=False)  # as 4-bit weights are
    module.register_buffer("frequencies", torch.tensor([1 / 3]))
    cast(module, torch.device("cpu"), torch.bfloat16)
    assert module.weight.dtype == module.bias.dtype == torch.bfloat16
    assert module.packed.dtype == torch.uint8 and module.packed.tolist() == [3, 200]
    assert module.frequencies.dtype == torch.float32
