"""Loads, fingerprints and saves models and tokenizers: Hugging Face folders with safetensors. Nothing is unpickled."""

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sdpo.data import tokenizer_check
from sdpo.errors import Unreachable, UserError
from sdpo.store import hash_files, key_of

transformers.utils.logging.disable_progress_bar()  # it shows one per shard; we show our own

WEIGHTS = "*.safetensors"
# The files beside the weights that decide what a model computes and how it is talked to.
CARRIED = ["config.json", "generation_config.json", "*.py", "*token*.json", "vocab*", "merges.txt", "*.model"]
CARRIED += ["*.tiktoken", "chat_template*", "*.jinja", "additional_chat_templates/*.jinja"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def locate(path: str | None, revision: str | None, on_hub: bool, trust_remote_code: bool = False) -> Path:
    """The folder of a model that was made elsewhere. A repository of the Hub is downloaded first, code only if trusted.

    Raises UserError if there is no such folder or repository, or if it lacks config.json or safetensors weights.
    """
    if not path:
        raise UserError("model.path is not set; name a folder (model=local) or a repository (model=hub)")
    if on_hub:
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
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json; name a Hugging Face model folder")
    if not any(folder.glob(WEIGHTS)):
        raise UserError(f"{folder} holds no *.safetensors; save it with save_pretrained first")
    return folder


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
    """The content hash of all that a model made elsewhere carries, not of its path.

    This is its weights, configuration and code, its tokenizer and chat template, and its generation config, because
    a step's folder carries them on.
    """
    carried = {path for pattern in CARRIED for path in folder.glob(pattern) if path.is_file()}
    return key_of("external", {"files": hash_files(folder, sorted({*weight_files(folder), *carried}))})


def fingerprint_weights(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> str:
    """The content hash (SHA-256, hex) of weights and their names, after a cast to `dtype`."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].to(dtype).reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """The content hash of everything in a tokenizer that decides token ids."""
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return key_of("tokenizer", {"backend": backend, "special": special, "template": tokenizer.chat_template})


def load(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder: fp32, in eval mode, with its own attention.

    Raises UserError if its files are damaged or lack weights, which transformers would initialise at random.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be loaded: its weights are damaged or of another model ({error})") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{folder} cannot be loaded: it lacks {len(missing)} weights, {missing[0]} among them")
    return model


def cast(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Move a module to a device and cast its parameters to `dtype`, one by one: fp32 weights never fill the device.

    Packed 4-bit weights keep their integer dtype. Buffers keep theirs too, as in `from_pretrained(dtype=...)` and in
    DeepSpeed: rotary frequencies in bf16 would change log-probs by a tenth of a nat per token at a thousand tokens.
    """
    for param in module.parameters():
        param.data = param.data.to(device, dtype if param.is_floating_point() else None)
    return module.to(device)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder.

    Raises UserError if the folder has none: transformers might then create one with an empty vocabulary.
    """
    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"{folder} holds no tokenizer; save one there with tokenizer.save_pretrained")
    return tokenizer_check.load(folder, trust_remote_code)


def save(
    model: PreTrainedModel, state: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write whole weights (named as in `model.state_dict()`), the configuration and the tokenizer."""
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def count_weights(folder: Path) -> int:
    """The number of weights in a model's files. Reads only the files' headers."""
    total = 0
    for path in weight_files(folder):
        with safe_open(path, framework="np") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total
