"""What a low-rank adapter is added to, what is trained whole beside it, and what is said of them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sdpo.errors import UserError
from sdpo.variants.tune import Adapter

WORTH_SAYING = 0.01  # share of all weights from which on it is said that matrices in no layer stay frozen


class Targets(NamedTuple):
    """What an adapter is added to, by full names."""

    layers: list[str]  # linear layers
    experts: list[str]  # parameters, each of which holds one weight of all experts of a layer
    left_out: list[str]  # linear layers that all-linear names and peft refuses


def find_targets(model: PreTrainedModel, ends: list[str]) -> Targets:
    """What tune.targets names: ends of names, or all-linear for all linear layers but the head and all experts.

    Raises UserError if a name is that of nothing, of something else, or of a layer that peft refuses.
    """
    head, modules, experts = model.get_output_embeddings(), dict(model.named_modules()), list(_experts(model))
    layers = [name for name, layer in modules.items() if isinstance(layer, nn.Linear | Conv1D) and layer is not head]
    refused = _refused(model, layers)
    if ends == ["all-linear"]:
        layers = [name for name in layers if name not in refused]
    else:
        named = {name for end in ends for name in _ending_in(end, [*modules, *experts], model, "targets")}
        if wrong := sorted(named.difference(layers, experts)):
            raise UserError(
                f"tune.targets names {wrong[0]}, which is not a linear layer of the model's body; leave it out, or "
                "train it whole with tune.modules_to_save"
            )
        if wrong := sorted(named.intersection(refused)):
            raise UserError(
                f"tune.targets names {wrong[0]}, which peft does not adapt in {type(model).__name__}, whose fast "
                "kernels would pass over the adapter; leave it out, or train it whole with tune.modules_to_save"
            )
        layers, experts = ([name for name in names if name in named] for names in (layers, experts))
        refused = []
    return Targets(layers, experts, refused)


def _refused(model: PreTrainedModel, layers: list[str]) -> list[str]:
    """The layers that peft refuses to adapt in a model of this type: some of Mamba's, whose kernels read the weight."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    settings, refused = LoraConfig(), []
    for name in layers:
        try:
            _check_lora_target_modules_mamba(settings, model, name.rpartition(".")[2])
        except ValueError:
            refused.append(name)
    return refused


def adapts_experts(folder: Path, ends: list[str], trust_remote_code: bool) -> bool:
    """Whether tune.targets names experts of the model in a folder. Reads the model's configuration alone."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return bool(find_targets(model, ends).experts)


def _experts(model: PreTrainedModel) -> dict[str, int]:
    """The parameters that hold one weight of all experts of a layer: their names and sizes."""
    named = model.named_parameters()
    return {name: param.numel() for name, param in named if ".experts." in name and param.dim() == 3}


def _ending_in(end: str, names: Iterable[str], model: PreTrainedModel, setting: str) -> list[str]:
    """The names whose last parts are `end`. Raises UserError, which names the setting, if there are none."""
    found = [name for name in names if f".{name}".endswith(f".{end}")]
    if not found:
        raise UserError(f"tune.{setting} names {end}, which {type(model).__name__} does not have")
    return found


def find_whole(model: PreTrainedModel, adapter: Adapter, targets: Targets) -> list[nn.Module]:
    """The modules that tune.modules_to_save names. Raises UserError if one is missing, adapted or of 4 bits."""
    found, paths = [], dict(model.named_modules())
    for end in adapter.modules_to_save:
        for path in _ending_in(end, paths, model, "modules_to_save"):
            is_adapted = any(f"{name}.".startswith(f"{path}.") for name in [*targets.layers, *targets.experts])
            if is_adapted or not all(param.is_floating_point() for param in paths[path].parameters()):
                raise UserError(
                    f"tune.modules_to_save names {end}, which holds adapters or 4-bit weights; leave it out"
                )
            found.append(paths[path])
    return found


def _in_no_layer(model: PreTrainedModel, whole: list[nn.Module]) -> dict[str, int]:
    """The names and sizes of matrices, and larger tensors, in no linear layer or embedding and not trained whole."""
    trained = {param for module in whole for param in module.parameters()}
    return {
        f"{path}.{name}".removeprefix("."): param.numel()
        for path, module in model.named_modules()
        if not isinstance(module, nn.Linear | Conv1D | nn.Embedding)
        for name, param in module.named_parameters(recurse=False)
        if param.dim() > 1 and param not in trained
    }


def describe(model: PreTrainedModel, adapter: Adapter, targets: Targets, whole: list[nn.Module], total: int) -> str:
    """What is adapted, what is trained whole and what else stays frozen: names and shares of all weights."""
    in_no_layer, experts = _in_no_layer(model, whole), _experts(model)
    others = [name for name in in_no_layer if name not in experts]
    frozen = [*targets.left_out, *(name for name in experts if name in in_no_layer and name not in targets.experts)]
    if sum(in_no_layer[name] for name in others) >= WORTH_SAYING * total:
        frozen += others
    sizes = dict(in_no_layer)
    for name in [*targets.layers, *targets.left_out]:
        layer: Any = model.get_submodule(name)
        is_linear = isinstance(layer, nn.Linear)  # whose weights are packed if they have 4 bits
        sizes[name] = layer.in_features * layer.out_features if is_linear else layer.weight.numel()

    def ending(name: str) -> str:  # of a parameter with its module's name, so that it can be told from others
        num_parts = (3 if name.endswith(".weight") else 2) if name in in_no_layer else 1
        return ".".join(name.split(".")[-num_parts:])

    def listed(names: list[str]) -> str:
        return ", ".join(sorted(set(map(ending, names))))

    def share(names: list[str]) -> str:
        return f"{sum(sizes[name] for name in names) / total:.1%}"

    adapted = [*targets.layers, *targets.experts]
    parts = [f"adapts {listed(adapted)} ({share(adapted)} of the weights)"]
    if whole:
        size = sum({param: param.numel() for module in whole for param in module.parameters()}.values())
        parts.append(f"trains {', '.join(adapter.modules_to_save)} whole ({size / total:.1%})")
    if frozen:
        parts.append(f"leaves {listed(frozen)} frozen ({share(frozen)})")
    return "tune=lora " + ", ".join(parts)
