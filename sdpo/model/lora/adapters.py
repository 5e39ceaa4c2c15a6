"""Low-rank adapters (LoRA): added to the model that a step starts from, and merged into whole weights at its end.

Whole modules may be trained too (embeddings, output head); the adapter file then holds their weights.
`between=merge`: a step's adapter is added to M_{t-1}. `between=stack`: it is added to S, together with one frozen
adapter that holds those of all earlier steps, concatenated along the rank. In both cases the weights that are saved,
scored and evaluated are the merged ones; the adapter is in the folder `adapter` beside them, in peft's format.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from sdpo import distributed
from sdpo.console import tell
from sdpo.errors import UserError
from sdpo.model import hub
from sdpo.model.lora.targets import Targets, describe, find_targets, find_whole
from sdpo.store.artifacts import Artifact, Store
from sdpo.variants.tune import Adapter

if TYPE_CHECKING:  # importing peft takes half a second: only runs with adapters should pay for it
    from peft import LoraConfig

FOLDER = "adapter"
WEIGHTS = "adapter_model.safetensors"
LINEAGE = "lineage.json"
PREFIX = "base_model.model."  # of the names in an adapter file
TRAINED, FROZEN = "fresh", "earlier"  # peft's names of the step's own adapter, and of those of all earlier steps


class AdapterSpec(NamedTuple):
    """What a step's adapter is made from: its settings, and the models and adapters below it."""

    adapter: Adapter
    start: Artifact
    base: Artifact  # the model that the adapter is added to
    num_earlier: int  # how many earlier adapters the start is made of

    @property
    def is_stacked(self) -> bool:
        """Whether a frozen adapter of the earlier steps is added to the base too."""
        return self.adapter.between == "stack" and self.num_earlier > 0


def spec_for(adapter: Adapter, start: Artifact, history: list[Artifact]) -> AdapterSpec:
    """The specification of the adapter of a step from `start`; `history` holds M_0 .. M_{t-1}.

    With `stack`, the base is that of the start's own adapter. If that model is not in `history`, because another run
    made it, the start itself is the base. So is a start from outside the store, even if a folder `adapter` lies beside
    its weights, because its key does not cover that folder.
    """
    lineage = start.folder / FOLDER / LINEAGE
    if not start.is_stored or not lineage.is_file():
        return AdapterSpec(adapter, start, start, 0)
    kept = json.loads(lineage.read_text())
    if adapter.between == "merge":
        return AdapterSpec(adapter, start, start, kept["num_adapters"])
    base = next((model for model in history if model.key == kept["base"]), start)
    return AdapterSpec(adapter, start, base, 0 if base is start else kept["num_adapters"])


class Loading(NamedTuple):
    """How weights are loaded; dtype and device matter for a quantised base only."""

    trust_remote_code: bool
    dtype: torch.dtype
    device: torch.device


def load(spec: AdapterSpec, seed: int, loading: Loading) -> PreTrainedModel:
    """The start of a step with a new adapter. Before training, its outputs are those of the start.

    Only the adapter and the modules of `modules_to_save` require gradients. Only the first adapter of a chain
    prints what it adapts. Raises UserError if targets or modules cannot be adapted or trained, or do not exist.
    """
    from peft import LoraModel

    adapter = spec.adapter
    if adapter.quantize == "none":
        model = hub.load(spec.base.folder, loading.trust_remote_code, as_stored=True)
    else:
        model = _quantised(spec.base, loading)
    targets = find_targets(model, adapter.targets)
    if targets.experts and adapter.dropout:
        raise UserError(
            f"tune.dropout={adapter.dropout} cannot be applied to experts such as {targets.experts[0]}: use "
            "tune.dropout=0, or name only linear layers in tune.targets"
        )
    whole = find_whole(model, adapter, targets)
    if spec.num_earlier == 0:
        tell(describe(model, adapter, targets, whole, hub.count_weights(spec.base.folder)))
    torch.manual_seed(seed * 1_000_003 - 1 - spec.num_earlier)  # the seeds of updates count up from seed * 1_000_003
    with _as_if_fp32(model):
        tuner = LoraModel(model, _lora_config(spec, 1, targets, adapter.dropout), TRAINED)
        if spec.is_stacked:
            tuner.peft_config[FROZEN] = _lora_config(spec, spec.num_earlier, targets)
            tuner.inject_adapter(model, FROZEN)
    for param in (param for module in whole for param in module.parameters() if param.dtype == torch.bfloat16):
        param.data = param.data.float()  # earlier steps trained it in fp32
    if spec.is_stacked:
        _fill(model, FROZEN, _earlier(spec))
        tuner.set_adapter([FROZEN, TRAINED])
        tuner.set_requires_grad(FROZEN, False)
    for module in whole:
        module.requires_grad_(True)
    return model.train(adapter.dropout > 0)


@contextmanager
def _as_if_fp32(model: PreTrainedModel) -> Iterator[None]:
    """Context in which bf16 weights look like fp32 ones, without memory: peft gives an adapter its base's dtype."""
    kept = {param: param.data for param in model.parameters() if param.dtype == torch.bfloat16}
    for param, data in kept.items():
        param.data = torch.zeros((), device=data.device).expand(data.shape)
    try:
        yield
    finally:
        for param, data in kept.items():
            param.data = data


def save_and_merge(
    spec: AdapterSpec, trained: dict[str, torch.Tensor], folder: Path, trust_remote_code: bool
) -> PreTrainedModel:
    """Write the trained weights (by parameter name) as an adapter into a step's folder.

    Returns the base, fp32, with the adapter merged into it.
    """
    from peft import LoraModel

    base, num_adapters = hub.load(spec.base.folder, trust_remote_code=trust_remote_code), 1
    factors = {name: tensor for name, tensor in trained.items() if ".lora_" in name}
    whole = _under_all_names(base, {name: trained[name] for name in trained.keys() - factors.keys()})
    weights = {_file_name(name, TRAINED): tensor for name, tensor in factors.items()}
    if spec.is_stacked:
        earlier, num_adapters = _earlier(spec), spec.num_earlier + 1
        rank = spec.adapter.rank
        weights = {name: concatenated(name, earlier[name], tensor, rank) for name, tensor in weights.items()}
    weights |= {_file_name(name, TRAINED): tensor for name, tensor in whole.items()}
    lora_config = _lora_config(spec, num_adapters, find_targets(base, spec.adapter.targets))
    _write(spec, weights, lora_config, folder / FOLDER, tied=len(whole) + len(factors) > len(trained))
    tuner = LoraModel(base, lora_config, TRAINED)
    _fill(base, TRAINED, weights)
    tuner.merge_and_unload()
    return base


def _write(
    spec: AdapterSpec, weights: dict[str, torch.Tensor], lora_config: "LoraConfig", folder: Path, tied: bool
) -> None:
    """Write an adapter's folder in peft's format, with one more file, the lineage: what the adapter was made from."""
    whole = {_module_name(name) for name in weights if ".lora_" not in name}
    described = replace(lora_config, modules_to_save=sorted(whole) or None, ensure_weight_tying=tied)
    described.target_modules = sorted(lora_config.target_modules or [])  # peft made it a set, whose order varies
    described.save_pretrained(str(folder))
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    lineage = {"base": spec.base.key, "start": spec.start.key, "num_adapters": spec.num_earlier + 1}
    (folder / LINEAGE).write_text(json.dumps(lineage, indent=1))


def concatenated(name: str, earlier: torch.Tensor, trained: torch.Tensor, rank: int) -> torch.Tensor:
    """A factor of the sum of two adapters, the second one of this rank, in each expert (a linear layer is one expert).

    A [experts * rank, in] is extended by rows within each expert. B [out, rank * experts] is extended by columns.
    """
    if ".lora_B." in name:
        return torch.cat([earlier, trained], dim=1)
    num_experts = len(trained) // rank
    return torch.cat([factor.unflatten(0, (num_experts, -1)) for factor in (earlier, trained)], dim=1).flatten(0, 1)


def rounded(model: Artifact, loading: Loading, store: Store, tokenizer: PreTrainedTokenizerBase) -> Artifact:
    """A model with its weights rounded to 4 bits and back. A quantised policy starts from S rounded, so this is M_0."""

    def build(folder: Path) -> None:
        if distributed.is_main():
            dequantised = _quantised(model, loading).dequantize(torch.float32)
            hub.save(dequantised, dict(dequantised.named_parameters()), tokenizer, folder)

    return store.make("rounded", {"model": model.key, "format": "nf4"}, build)


def _earlier(spec: AdapterSpec) -> dict[str, torch.Tensor]:
    """The adapters of all earlier steps, as one."""
    return load_file(spec.start.folder / FOLDER / WEIGHTS)


def _quantised(model: Artifact, loading: Loading) -> PreTrainedModel:
    """The model in blocks of 4-bit normal floats, except for its output head (QLoRA, Dettmers et al. 2305.14314).

    The scales of the blocks stay fp32, so that rounding weights that are already rounded changes nothing.
    """
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=loading.dtype
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        model.folder,
        dtype=torch.float32,
        quantization_config=quantisation,
        device_map={"": loading.device},
        use_safetensors=True,
        trust_remote_code=loading.trust_remote_code,
    )
    layers: list[Any] = [layer for layer in loaded.modules() if hasattr(layer, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False  # this kernel has no backward pass
    return loaded


def _lora_config(spec: AdapterSpec, num_steps: int, targets: Targets, dropout: float = 0.0) -> "LoraConfig":
    """peft's settings for the adapters of `num_steps` steps as one; rank and alpha grow together, their ratio stays."""
    from peft import LoraConfig

    adapter = spec.adapter
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=spec.base.key,
        r=num_steps * adapter.rank,
        lora_alpha=num_steps * adapter.alpha,  # type: ignore[arg-type]  # declared int, but peft takes any number
        lora_dropout=dropout,
        target_modules=targets.layers,
        target_parameters=targets.experts or None,
    )


def _fill(model: PreTrainedModel, adapter: str, weights: dict[str, torch.Tensor]) -> None:
    """Copy the weights of an adapter file into an adapter of the model, and into the modules trained beside it."""
    named = model.named_parameters(remove_duplicate=False)
    parameters = {_file_name(name, adapter): parameter for name, parameter in named}
    for name, tensor in weights.items():
        parameters[name].data.copy_(tensor)


def _under_all_names(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under every name that they have in the model: peft expects tied weights once per module."""
    first = {parameter: name for name, parameter in model.named_parameters()}
    assert weights.keys() <= set(first.values())
    named = model.named_parameters(remove_duplicate=False)
    return {name: weights[first[param]].clone() for name, param in named if first[param] in weights}


def _file_name(name: str, adapter: str) -> str:
    """The name of a parameter in an adapter file."""
    return PREFIX + name.replace(f".{adapter}.", ".")


def _module_name(name: str) -> str:
    """The module that a parameter of an adapter file belongs to."""
    return name.removeprefix(PREFIX).rpartition(".")[0]
