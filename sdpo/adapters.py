"""Low-rank adapters: put on the model that a step starts from, merged into whole weights at its end.

`between=merge`: a step's adapter stands on M_{t-1}. `between=stack`: it stands on S, beside one frozen adapter that
is those of all earlier steps, concatenated along the rank. Either way the weights that are kept, scored and evaluated
are the merged ones; the adapter lies in the folder `adapter` beside them, in peft's format.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from sdpo import launch, models
from sdpo.config import Config
from sdpo.store import Artifact, Store
from sdpo.tune import Adapter

# peft is imported where it is used: it takes half a second, which runs without adapters should not pay.

FOLDER = "adapter"
WEIGHTS = "adapter_model.safetensors"
LINEAGE = "lineage.json"
FRESH, EARLIER = "fresh", "earlier"  # peft's names of the trained and the frozen adapter

Find = Callable[[str], Artifact]  # from a key to the model


def load(adapter: Adapter, start: Artifact, config: Config, find: Find) -> PreTrainedModel:
    """The start of a step with a fresh adapter, which alone is trained; as a function it is the start still.

    Raises ValueError where the targets are not linear layers of the model's body.
    """
    from peft import LoraModel

    base, num_earlier = _lineage(adapter, start, find)
    model = _frozen(adapter, base, config)
    torch.manual_seed(config.seed * 1_000_003 - 1 - num_earlier)  # the updates' seeds count up from there
    tuner = LoraModel(model, _peft_config(adapter, base, 1, adapter.dropout), FRESH)
    if adapter.between == "stack" and num_earlier:
        tuner.peft_config[EARLIER] = _peft_config(adapter, base, num_earlier)
        tuner.inject_adapter(model, EARLIER)
        _fill(model, EARLIER, load_file(start.folder / FOLDER / WEIGHTS))
        tuner.set_adapter([EARLIER, FRESH])
        tuner.set_requires_grad(EARLIER, False)
    _check_targets(model)
    return model.train(adapter.dropout > 0)


def finish(adapter: Adapter, start: Artifact, trained: dict[str, torch.Tensor], folder: Path, find: Find):
    """Write the trained adapter, by parameter name, into a step's folder; returns the model with it merged, in fp32."""
    from peft import LoraModel

    base, num_earlier = _lineage(adapter, start, find)
    weights, num_steps = {_peft_name(name, FRESH): tensor for name, tensor in trained.items()}, 1
    if adapter.between == "stack" and num_earlier:
        earlier, num_steps = load_file(start.folder / FOLDER / WEIGHTS), num_earlier + 1
        weights = {name: concatenated(name, earlier[name], tensor) for name, tensor in weights.items()}
    settings = _peft_config(adapter, base, num_steps)
    settings.target_modules = sorted({name.split(".lora_")[0] for name in trained})
    settings.save_pretrained(folder / FOLDER)
    save_file(weights, folder / FOLDER / WEIGHTS, metadata={"format": "pt"})
    lineage = {"base": base.key, "start": start.key, "num_adapters": num_earlier + 1}
    (folder / FOLDER / LINEAGE).write_text(json.dumps(lineage, indent=1))
    unmerged = LoraModel(models.load(base.folder), settings, FRESH)
    _fill(unmerged.model, FRESH, weights)
    return unmerged.merge_and_unload()


def concatenated(name: str, earlier: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    """A factor of the sum of two adapters: A [rank, in] grows downwards, B [out, rank] to the right."""
    return torch.cat([earlier, fresh], dim=0 if ".lora_A." in name else 1)


def rounded(given: Artifact, config: Config, store: Store, tokenizer: PreTrainedTokenizerBase) -> Artifact:
    """The weights of a model as 4 bits hold them: what a quantised policy starts from is S rounded, so this is M_0."""

    def build(folder: Path) -> None:
        if launch.is_main():
            model = _quantised(given, config, torch.float32).dequantize(torch.float32)
            models.save(model, dict(model.named_parameters()), tokenizer, folder)

    return store.make("rounded", {"model": given.key, "format": "nf4"}, build)


def _lineage(adapter: Adapter, start: Artifact, find: Find) -> tuple[Artifact, int]:
    """The model that an adapter of a step from `start` stands on, and how many steps' adapters made `start`."""
    kept = start.folder / FOLDER / LINEAGE
    if not kept.is_file() or not (start.folder / "manifest.json").is_file():  # S, whatever else its folder holds
        return start, 0
    lineage = json.loads(kept.read_text())
    return find(lineage["base"]) if adapter.between == "stack" else start, lineage["num_adapters"]


def _frozen(adapter: Adapter, base: Artifact, config: Config) -> PreTrainedModel:
    if adapter.quantize == "4bit":
        return _quantised(base, config, models.DTYPES[config.precision])
    return models.load(base.folder, trust_remote_code=config.model.trust_remote_code)


def _quantised(model: Artifact, config: Config, dtype: torch.dtype) -> PreTrainedModel:
    """In blocks of 4-bit normal floats, but for the output head. Their scales stay fp32: then rounding what was
    rounded before changes nothing."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(
        model.folder,
        dtype=dtype,
        quantization_config=settings,
        device_map={"": launch.device(config.launch.device)},
        use_safetensors=True,
        trust_remote_code=config.model.trust_remote_code,
    )


def _peft_config(adapter: Adapter, base: Artifact, num_steps: int, dropout: float = 0.0):
    """peft's settings of `num_steps` adapters as one: rank and alpha grow together, so that their ratio stays."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.key,
        r=num_steps * adapter.rank,
        lora_alpha=num_steps * adapter.alpha,
        lora_dropout=dropout,
        target_modules="all-linear" if adapter.targets == ["all-linear"] else adapter.targets,
    )


def _fill(model: PreTrainedModel, name: str, weights: dict[str, torch.Tensor]) -> None:
    """Give an adapter the weights of an adapter file."""
    for parameter, tensor in model.named_parameters():
        if f".{name}." in parameter:
            tensor.data.copy_(weights[_peft_name(parameter, name)])


def _peft_name(name: str, adapter: str) -> str:
    """A parameter's name in an adapter file."""
    return "base_model.model." + name.replace(f".{adapter}.", ".")


def _check_targets(model: PreTrainedModel) -> None:
    from peft.tuners.lora import LoraLayer

    head = model.get_output_embeddings()
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and (layer is head or layer.lora_embedding_A):
            raise ValueError(f"tune.targets names {name}, which is no linear layer of the model's body; leave it out")
