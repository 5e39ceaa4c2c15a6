"""Load, fingerprint and save models and tokenizers: Hugging Face folders with safetensors, nothing unpickled."""

import hashlib
import math
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sdpo.errors import Unreachable, UserError
from sdpo.store import hash_files, key_of

transformers.utils.logging.disable_progress_bar()  # one a shard; this project shows its own

WEIGHTS = "*.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def locate(path: str | None, revision: str | None, on_hub: bool, trust_remote_code: bool = False) -> Path:
    """The folder of a model that was made elsewhere; a repository of the hub is fetched first, its code if trusted.

    Raises UserError where there is no folder, or none with safetensors weights.
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
    """Whether a model is on this machine: as a folder, or as a repository in the Hub's cache."""
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
    """The files of a model's weights; a finished step may have its optimiser's moments beside them."""
    return [path for path in folder.glob(WEIGHTS) if not path.name.startswith("moments-")]


def fingerprint(folder: Path) -> str:
    """The content hash of a model made elsewhere: weights, configuration and code, never its path."""
    files = [*weight_files(folder), folder / "config.json", *folder.glob("*.py")]
    return key_of("external", {"files": hash_files(folder, files)})


def fingerprint_weights(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> str:
    """The content hash (SHA-256, hex) of weights by name, cast to `dtype`."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].to(dtype).reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """The content hash of what turns text into token ids."""
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return key_of("tokenizer", {"backend": backend, "special": special, "template": tokenizer.chat_template})


def load(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder in fp32, in eval mode, with its own attention.

    Raises UserError where its files are damaged, or lack weights, which would be made up at random.
    """
    try:
        model, seen = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be loaded: its weights are damaged or of another model ({error})") from error
    if missing := sorted(seen["missing_keys"]):
        raise UserError(f"{folder} cannot be loaded: it lacks {len(missing)} weights, {missing[0]} among them")
    return model


def cast(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Move a module, its parameters as `dtype` (on the way: the fp32 weights never fill the device).

    Buffers keep theirs, as in `from_pretrained(dtype=...)` and in DeepSpeed: rotary frequencies in bf16 would be
    another model, by a tenth of a nat a token at a thousand tokens.
    """
    for param in module.parameters():
        param.data = param.data.to(device, dtype)
    return module.to(device)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder. UserError where there is none: transformers may make up one that knows no word."""
    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"{folder} holds no tokenizer; save one there with tokenizer.save_pretrained")
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def save(
    model: PreTrainedModel, state: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write full weights (names as in `model.state_dict()`) with configuration and tokenizer beside them."""
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def count_weights(folder: Path) -> int:
    """The number of weights in a model's files, of which only the headers are read."""
    total = 0
    for path in weight_files(folder):
        with safe_open(path, framework="np") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total
