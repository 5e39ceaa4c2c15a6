"""Low-rank adapters: put on the model that a step starts from, merged into whole weights at its end.

Beside them whole modules may be trained (embeddings, output head); they lie in the adapter's file as they are.
`between=merge`: a step's adapter stands on M_{t-1}. `between=stack`: it stands on S, beside one frozen adapter that
is those of all earlier steps, concatenated along the rank. Either way the weights that are kept, scored and evaluated
are the merged ones; the adapter lies in the folder `adapter` beside them, in peft's format.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from sdpo import distributed
from sdpo.errors import UserError
from sdpo.model import hub
from sdpo.store import Artifact, Store
from sdpo.variants.tune import Adapter

# peft is imported where it is used: it takes half a second, which runs without adapters should not pay.

FOLDER = "adapter"
WEIGHTS = "adapter_model.safetensors"
LINEAGE = "lineage.json"
PREFIX = "base_model.model."  # of the names in an adapter file
FRESH, EARLIER = "fresh", "earlier"  # peft's names of the trained and the frozen adapter


class Place(NamedTuple):
    """Where a step's adapter stands: `base` is the model under it, `num_earlier` how many adapters made the start."""

    adapter: Adapter
    start: Artifact
    base: Artifact
    num_earlier: int

    @property
    def stacked(self) -> bool:
        """Whether a frozen adapter stands beside the fresh one."""
        return self.adapter.between == "stack" and self.num_earlier > 0


def place(adapter: Adapter, start: Artifact, find: Callable[[str], Artifact]) -> Place:
    """The place of the adapter of a step from `start`; `find` gives the model of a key."""
    lineage = start.folder / FOLDER / LINEAGE
    if not lineage.is_file() or not (start.folder / "manifest.json").is_file():  # S, whatever else its folder holds
        return Place(adapter, start, start, 0)
    kept = json.loads(lineage.read_text())
    base = find(kept["base"]) if adapter.between == "stack" else start
    return Place(adapter, start, base, kept["num_adapters"])


class Loading(NamedTuple):
    """How weights are loaded: the dtype and device are those of a quantised base."""

    trust_remote_code: bool
    dtype: torch.dtype
    device: torch.device


def load(place: Place, seed: int, loading: Loading) -> PreTrainedModel:
    """The start of a step with what is trained, a fresh adapter and whole modules; as a function it is the start still.

    Raises UserError where the targets are not linear layers of the model's body, or a module is not there.
    """
    from peft import LoraModel

    adapter = place.adapter
    model = _base(place, loading.trust_remote_code) if adapter.quantize == "none" else _quantised(place.base, loading)
    targets = _all_linear(model) if adapter.targets == ["all-linear"] else adapter.targets
    whole = {name: _modules(model, name) for name in adapter.modules_to_save}
    torch.manual_seed(seed * 1_000_003 - 1 - place.num_earlier)  # the updates' seeds count up from there
    tuner = LoraModel(model, _settings(place, 1, targets, adapter.dropout), FRESH)
    if place.stacked:
        tuner.peft_config[EARLIER] = _settings(place, place.num_earlier, targets)
        tuner.inject_adapter(model, EARLIER)
        _fill(model, EARLIER, _earlier(place))
        tuner.set_adapter([EARLIER, FRESH])
        tuner.set_requires_grad(EARLIER, False)
    _check_targets(model)
    for name, modules in whole.items():
        _train_whole(name, modules)
    return model.train(adapter.dropout > 0)


def finish(place: Place, trained: dict[str, torch.Tensor], folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    """Write the trained adapter (by parameter name) into a step's folder; returns the base with it merged, fp32."""
    from peft import LoraModel

    base, num_adapters = _base(place, trust_remote_code), 1
    factors = {name: tensor for name, tensor in trained.items() if ".lora_" in name}
    whole = _under_all_names(base, {name: trained[name] for name in trained.keys() - factors.keys()})
    weights = {_file_name(name, FRESH): tensor for name, tensor in factors.items()}
    if place.stacked:
        earlier, num_adapters = _earlier(place), place.num_earlier + 1
        weights = {name: concatenated(name, earlier[name], tensor) for name, tensor in weights.items()}
    weights |= {_file_name(name, FRESH): tensor for name, tensor in whole.items()}
    settings = _settings(place, num_adapters, {name.split(".lora_")[0] for name in factors})
    _write(place, weights, settings, folder / FOLDER, tied=len(whole) + len(factors) > len(trained))
    tuner = LoraModel(base, settings, FRESH)
    _fill(tuner.model, FRESH, weights)
    return tuner.merge_and_unload()


def _write(place: Place, weights: dict[str, torch.Tensor], settings, folder: Path, tied: bool) -> None:
    """An adapter's folder as peft reads it, and beside its settings what it stands on."""
    whole = {_module_name(name) for name in weights if ".lora_" not in name}
    described = replace(settings, modules_to_save=sorted(whole) or None, ensure_weight_tying=tied)
    described.target_modules = sorted(settings.target_modules)  # peft made a set of them, whose order varies
    described.save_pretrained(folder)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    lineage = {"base": place.base.key, "start": place.start.key, "num_adapters": place.num_earlier + 1}
    (folder / LINEAGE).write_text(json.dumps(lineage, indent=1))


def concatenated(name: str, earlier: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    """A factor of the sum of two adapters: A [rank, in] grows downwards, B [out, rank] to the right."""
    return torch.cat([earlier, fresh], dim=0 if ".lora_A." in name else 1)


def rounded(given: Artifact, loading: Loading, store: Store, tokenizer: PreTrainedTokenizerBase) -> Artifact:
    """The weights of a model as 4 bits hold them: what a quantised policy starts from is S rounded, so this is M_0."""

    def build(folder: Path) -> None:
        if distributed.is_main():
            model = _quantised(given, loading).dequantize(torch.float32)
            hub.save(model, dict(model.named_parameters()), tokenizer, folder)

    return store.make("rounded", {"model": given.key, "format": "nf4"}, build)


def _base(place: Place, trust_remote_code: bool) -> PreTrainedModel:
    return hub.load(place.base.folder, trust_remote_code=trust_remote_code)


def _earlier(place: Place) -> dict[str, torch.Tensor]:
    """The adapters of all earlier steps, as one."""
    return load_file(place.start.folder / FOLDER / WEIGHTS)


def _quantised(model: Artifact, loading: Loading) -> PreTrainedModel:
    """In blocks of 4-bit normal floats, but for the output head. The blocks' scales stay fp32: then rounding what was
    rounded before changes nothing."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=loading.dtype)
    loaded = AutoModelForCausalLM.from_pretrained(
        model.folder,
        dtype=torch.float32,
        quantization_config=settings,
        device_map={"": loading.device},
        use_safetensors=True,
        trust_remote_code=loading.trust_remote_code,
    )
    for layer in loaded.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # that kernel has no backward pass
    return loaded


def _settings(place: Place, num_steps: int, targets: Iterable[str], dropout: float = 0.0):
    """peft's, of `num_steps` adapters as one: rank and alpha grow together, so that their ratio stays."""
    from peft import LoraConfig

    adapter = place.adapter
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=place.base.key,
        r=num_steps * adapter.rank,
        lora_alpha=num_steps * adapter.alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
    )


def _fill(model: PreTrainedModel, name: str, weights: dict[str, torch.Tensor]) -> None:
    """Give an adapter, and the modules trained beside it, the weights of an adapter file."""
    named = model.named_parameters(remove_duplicate=False)
    parameters = {_file_name(parameter, name): tensor for parameter, tensor in named}
    for key, tensor in weights.items():
        parameters[key].data.copy_(tensor)


def _under_all_names(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under every name that the model has for them: peft expects a tied one under the names of both modules."""
    first = {parameter: name for name, parameter in model.named_parameters()}
    assert weights.keys() <= set(first.values())
    named = model.named_parameters(remove_duplicate=False)
    return {name: weights[first[param]].clone() for name, param in named if first[param] in weights}


def _file_name(name: str, adapter: str) -> str:
    """A parameter's name in an adapter file."""
    return PREFIX + name.replace(f".{adapter}.", ".")


def _module_name(name: str) -> str:
    """The module of a parameter in an adapter file."""
    return name.removeprefix(PREFIX).rpartition(".")[0]


def _all_linear(model: PreTrainedModel) -> list[str]:
    """The names of the linear layers but the output head; experts that are kept as one stack are none."""
    head = model.get_output_embeddings()
    return [
        name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D) and layer is not head
    ]


def _check_targets(model: PreTrainedModel) -> None:
    from peft.tuners.lora import LoraLayer

    head = model.get_output_embeddings()
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and (layer is head or layer.lora_embedding_A):
            raise UserError(
                f"tune.targets names {name}, which is no linear layer of the model's body; leave it out, or train it "
                "whole with tune.modules_to_save"
            )


def _modules(model: PreTrainedModel, name: str) -> list[nn.Module]:
    """The modules whose path ends in this name."""
    found = [module for path, module in model.named_modules() if f".{path}".endswith(f".{name}")]
    if not found:
        raise UserError(f"tune.modules_to_save names {name}, which {type(model).__name__} does not have")
    return found


def _train_whole(name: str, modules: list[nn.Module]) -> None:
    for module in modules:
        if any("lora_" in part or not tensor.is_floating_point() for part, tensor in module.named_parameters()):
            raise UserError(f"tune.modules_to_save names {name}, which holds adapters or 4-bit weights; leave it out")
        module.requires_grad_(True)
