"""Loads, fingerprints and saves models and tokenizers: Hugging Face folders with safetensors. Nothing is unpickled."""

import json
import math
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from sdpo import distributed
from sdpo.data import tokenizer_check
from sdpo.errors import Unreachable, UserError
from sdpo.store.artifacts import key_of
from sdpo.store.hashing import Block, hash_blocks, hash_files, hash_json, hash_weights

transformers.utils.logging.disable_progress_bar()  # it shows one per shard; we show our own

WEIGHTS = "*.safetensors"
WHOLE = "model.safetensors"  # transformers' name of a model's only file
EXPERTS = ".experts."  # in the names of the weights of a mixture's experts, of which a token reads some
# The files beside the weights that decide what a model computes and how it is talked to.
CARRIED = ["config.json", "generation_config.json", "*.py", "*token*.json", "vocab*", "merges.txt", "*.model"]
CARRIED += ["*.tiktoken", "chat_template*", "*.jinja", "additional_chat_templates/*.jinja"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STORED_AS = {torch.float32: "F32", torch.bfloat16: "BF16"}  # in safetensors' words


def locate(path: str | None, revision: str | None, on_hub: bool, trust_remote_code: bool = False) -> Path:
    """The folder of a model that was made elsewhere. A repository of the Hub is downloaded first, code only if trusted.
    A folder that exists is taken even if the model is sought on the Hub.

    Raises UserError if there is no such folder or repository, if it lacks config.json or safetensors weights, if the
    weights are quantised, and if it holds an adapter.
    """
    if not path:
        raise UserError("model.path is not set; name a folder (model=local) or a repository (model=hub)")
    if on_hub and not Path(path).is_dir():
        from huggingface_hub import snapshot_download

        _check_repository(path)
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        if trust_remote_code:
            patterns.append("*.py")
        try:
            path = snapshot_download(path, revision=revision, allow_patterns=patterns)
        except OSError as error:
            raise Unreachable(path, error) from error
    folder = Path(path)
    has_config = (folder / "config.json").is_file()
    if (folder / "adapter_config.json").is_file():
        held = "an adapter beside whole weights, so that it names two models" if has_config else "only an adapter"
        raise UserError(
            f"{folder} holds {held}: merge the adapter into its base with peft (merge_and_unload), save the result "
            "with save_pretrained, and name that folder; or remove the adapter's files"
        )
    if not has_config:
        raise UserError(f"{folder} holds no config.json; name a Hugging Face model folder")
    if not any(folder.glob(WEIGHTS)):
        raise UserError(f"{folder} holds no *.safetensors; save it with save_pretrained first")
    _check_not_quantised(folder)
    return folder


def _check_not_quantised(folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} is not JSON ({error}); copy or download it again") from error
    if quantised := config.get("quantization_config") or config.get("compression_config"):
        method = quantised.get("quant_method", "unknown method")
        raise UserError(
            f"{folder} holds quantised weights ({method}), which cannot be trained or scored here; name the model that "
            "they were made from (tune=lora tune.quantize=4bit rounds its weights to 4 bits while it trains)"
        )


def is_here(path: str, revision: str | None = None) -> bool:
    """Whether a model is on this machine: as a folder, or as a repository in the local cache of the Hub.

    Raises UserError if `path` is neither a folder nor a valid repository name.
    """
    if Path(path).is_dir():
        return True
    from huggingface_hub import try_to_load_from_cache

    _check_repository(path)
    return isinstance(try_to_load_from_cache(path, "config.json", revision=revision), str)


def _check_repository(path: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError as error:
        raise UserError(f"{path} is neither a folder nor the name of a repository of the Hub") from error


def weight_files(folder: Path) -> list[Path]:
    """The files with a model's weights, without the optimiser moments that a finished step may have beside them."""
    return [path for path in folder.glob(WEIGHTS) if not path.name.startswith("moments-")]


def fingerprint(folder: Path) -> str:
    """The content hash of a model from outside the store; its path does not count.

    It covers weights, configuration, code, tokenizer, chat template and generation config, because M_t inherits all.
    """
    carried = {path for pattern in CARRIED for path in folder.glob(pattern) if path.is_file()}
    files = hash_files(folder, carried - {*weight_files(folder)})
    return key_of("external", {"weights": fingerprint_files(folder), "files": files})


def fingerprint_files(folder: Path) -> str:
    """The content hash of a model's weights as they are stored, however many files they are in."""
    return hash_weights(weight_files(folder))


def fingerprint_weights(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> str:
    """The content hash that a file with these weights, cast to `dtype`, has."""
    blocks = {}
    for name, weight in weights.items():
        content = weight.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data
        blocks[name] = Block(STORED_AS[dtype], [*weight.shape], content)
    return hash_json(hash_blocks(blocks))


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """The content hash of everything in a tokenizer that decides token ids."""
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return key_of("tokenizer", {"backend": backend, "special": special, "template": tokenizer.chat_template})


def load(folder: Path, trust_remote_code: bool = False, as_stored: bool = False) -> PreTrainedModel:
    """The model of a folder in eval mode with its own attention, in fp32; `as_stored`: in bf16 if all its weights are.

    Weights in the dtype of their file are mapped into memory and not copied: all processes of a machine share them.
    Raises UserError if its files are damaged, lack weights, which transformers would initialise at random, have others
    that it would ignore, or hold a number that is not finite.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16 if as_stored and _dtypes(folder) == {"BF16"} else torch.float32,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be loaded: its weights are damaged or of another model ({error})") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{folder} cannot be loaded: it lacks {len(missing)} weights, {missing[0]} among them")
    if unexpected := sorted(report["unexpected_keys"]):
        raise UserError(
            f"{folder} cannot be loaded: {type(model).__name__} has no place for {len(unexpected)} of its weights, "
            f"{unexpected[0]} among them; remove them, or correct the architecture in config.json"
        )
    for name, param in model.named_parameters():
        if param.numel() and not torch.stack(param.detach().aminmax()).isfinite().all():
            raise UserError(f"{folder} cannot be used: its weight {name} holds NaN or infinity; save the model again")
    return model


def cast(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Move a module to a device and cast it to `dtype` there, one parameter at a time, so that fp32 never fills it.

    Packed 4-bit weights keep their integer dtype. Buffers keep theirs too, as in `from_pretrained(dtype=...)` and in
    DeepSpeed: rotary frequencies in bf16 would change log-probs by a tenth of a nat per token at a thousand tokens.
    """
    for param in module.parameters():
        param.data = param.data.to(device).to(dtype if param.is_floating_point() else param.dtype)
    return module.to(device)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder.

    Raises UserError if the folder has none: transformers might then create one with an empty vocabulary.
    """
    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"{folder} holds no tokenizer; save one there with tokenizer.save_pretrained")
    return tokenizer_check.load(folder, trust_remote_code)


def save(
    model: PreTrainedModel,
    state: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    stops: list[int] | None = None,
) -> None:
    """Write whole weights (named as in `model.state_dict()`), the configuration with their dtype, and the tokenizer.

    The model's persistent buffers, such as the biases by which some routers choose experts, are written as they are.
    `stops` are the ids at which generation ends, if they are not to stay those of the model.
    """
    dtype, chosen = str(next(iter(state.values())).dtype).removeprefix("torch."), model.generation_config
    for name, buffer in _persistent_buffers(model).items():
        state.setdefault(name, buffer)
    model.generation_config = GenerationConfig()  # transformers refuses to write some that are published
    try:
        model.save_pretrained(folder, state_dict=state, max_shard_size="1TB")  # empties `state`
    finally:
        model.generation_config = chosen
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("dtype") != dtype:  # transformers writes that of the model in memory
        path.write_text(json.dumps(config | {"dtype": dtype}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    written = copy(chosen)
    written.eos_token_id = stops or chosen.eos_token_id
    written.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
    tokenizer.save_pretrained(folder)


def _persistent_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tensor.cpu() for name, tensor in model.state_dict().items() if name not in weights}


def save_shares(
    model: PreTrainedModel,
    share: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    stops: list[int] | None = None,
) -> None:
    """As `save`, but every rank has a share of the weights, perhaps an empty one, and writes it into a file of its own.

    The first rank has a share. Several files have an index, as transformers writes it.
    """
    ranks = [rank for rank, has_one in enumerate(distributed.gather(bool(share))) if has_one]
    if len(ranks) == 1:
        if share:
            save(model, share, tokenizer, folder, stops)
        return
    part = folder / (WHOLE if distributed.is_main() else f"part-{distributed.rank()}.safetensors")
    if distributed.is_main():
        save(model, share, tokenizer, folder, stops)
    elif share:  # transformers' own `save_pretrained` writes nothing here
        save_file(revert_weight_conversion(model, share), part, metadata={"format": "pt"})
    distributed.barrier()  # `save_pretrained` removes files that have the names of parts
    if part.exists():
        part.rename(folder / f"model-{ranks.index(distributed.rank()) + 1:05}-of-{len(ranks):05}.safetensors")
    distributed.barrier()
    if distributed.is_main():
        names = {path: safe_open(path, framework="np").keys() for path in weight_files(folder)}
        index = {
            "metadata": {"total_size": sum(path.stat().st_size for path in names)},
            "weight_map": {name: path.name for path in names for name in names[path]},
        }
        (folder / f"{WHOLE}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def count_weights(folder: Path, per_token: bool = False) -> int:
    """The number of weights in a model's files; `per_token` counts only as many experts as a token reads.

    Reads only the files' headers and config.json.
    """
    share = 1.0
    if per_token:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        share = share_of_experts(config.get("text_config", config))
    return round(sum(math.prod(h.get_shape()) * (share if EXPERTS in name else 1) for name, h in _headers(folder)))


def share_of_experts(config: dict[str, Any]) -> float:
    """The share of a layer's experts that a token reads, by the configuration of a text model; 1 if it does not say."""
    counts = (config.get(name) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    num, read = next(filter(None, counts), None), config.get("num_experts_per_tok")
    return read / num if num and read else 1.0


def _dtypes(folder: Path) -> set[str]:
    """The dtypes of a model's files, in safetensors' names. Raises UserError if a file cannot be read."""
    try:
        return {header.get_dtype() for _, header in _headers(folder)}
    except SafetensorError as error:
        raise UserError(f"{folder} cannot be loaded: its weights are damaged ({error})") from error


def _headers(folder: Path) -> Iterator[tuple[str, Any]]:
    """What safetensors knows of each tensor of a model, by name, without reading it: shape and dtype."""
    for path in weight_files(folder):
        with safe_open(path, framework="np") as file:
            yield from ((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118
