"""The workload of all parts of the benchmark: a random model, its tokenizer and pairs of token ids."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import lognorm
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from sdpo import config
from sdpo.data import preferences
from sdpo.errors import UserError
from sdpo.types import TokenPair

WORDS, EOS, MAX_TOKENS = 8192, 2, 1024
BETA, LR = 0.1, 5e-7
PASSES = 2  # over all pairs: the first one, and one in steady state
LORA: dict[str, Any] = {"r": 16, "target_modules": "all-linear"}
# Mean tokens of prompt, chosen and rejected. Lognormal distributions with these means, and standard deviations equal to
# the means, reproduce the published medians of ultrafeedback_binarized and orca_dpo_pairs (arXiv 2410.20305).
PROFILES = {"ultrafeedback": (160, 300, 265), "orca": (235, 195, 195)}


# Shapes of Llama models: vocabulary, hidden size, intermediate size, layers, heads, key-value heads. The toy has 4.7
# million parameters in its layers and as many in embeddings and head; one core trains it in seconds. The others have
# the shapes of SmolLM2 135M, of Llama 3.2 1B and 3B, of Mistral 7B and of Llama 3.1 8B.
SHAPES = {
    "tiny": (WORDS, 32, 64, 1, 2, 2),
    "toy": (WORDS, 256, 688, 6, 4, 4),
    "135m": (49_152, 576, 1536, 30, 9, 3),
    "1b": (128_256, 2048, 8192, 16, 32, 8),
    "3b": (128_256, 3072, 8192, 28, 24, 8),
    "7b": (32_000, 4096, 14_336, 32, 32, 8),
    "8b": (128_256, 4096, 14_336, 32, 32, 8),
}


class Work(NamedTuple):
    """The input of a part; `folder` holds the pairs."""

    folder: str
    shape: str
    pairs_per_update: int
    precision: str
    device: str
    trl_batches: list[int]  # pairs in a micro-batch of TRL; with its tuned settings all are tried
    packs: list[int]  # most tokens of a micro-batch of this engine; the comparison uses the first one
    compiled: list[bool]  # whether this engine compiles the decoder; the comparison uses the first one
    lora: bool = False

    @property
    def model(self) -> Path:
        """The folder that `save_model` writes."""
        return Path(self.folder) / "model"

    def rows(self) -> list[TokenPair]:
        """The pairs as token ids."""
        listed = json.loads((Path(self.folder) / "pairs.json").read_text())
        return [TokenPair(f"{i:05d}", *(np.array(ids, np.int32) for ids in three)) for i, three in enumerate(listed)]

    def build(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The model, with random weights of seed 0, made on the device: nothing is read from disk."""
        torch.manual_seed(0)
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(shape(self.shape), dtype=dtype)

    def save_model(self) -> None:
        """Write the model and its tokenizer, for a part that measures reading and writing too."""
        self.build().save_pretrained(self.model)
        tokenizer().save_pretrained(self.model)


def prepare(work: Work, lengths: np.ndarray) -> None:
    """Write pairs of lengths [N, 3] (prompt, chosen, rejected); their tokens come from seed 0."""
    rng = np.random.default_rng(0)
    pairs = []
    for prompt, chosen, rejected in lengths.tolist():
        ids = [rng.integers(3, WORDS, n).tolist() for n in (prompt, chosen - 1, rejected - 1)]
        pairs.append([ids[0], [*ids[1], EOS], [*ids[2], EOS]])
    Path(work.folder).mkdir(parents=True)
    (Path(work.folder) / "pairs.json").write_text(json.dumps(pairs))


def from_profile(profile: str, num_pairs: int) -> np.ndarray:
    """Lengths [N, 3] at evenly spaced quantiles, each column shuffled: a small sample that covers the distribution."""
    rng = np.random.default_rng(0)
    quantiles = (np.arange(num_pairs) + 0.5) / num_pairs
    sigma = np.sqrt(np.log(2))  # standard deviation equal to the mean
    columns = [rng.permutation(lognorm.ppf(quantiles, sigma, scale=mean / np.sqrt(2))) for mean in PROFILES[profile]]
    return _cut(np.stack(columns, axis=1))


def from_file(path: Path, num_pairs: int) -> np.ndarray:
    """Lengths [N, 3] of the first pairs of a file, at 4 characters per token. Raises UserError if there are too few."""
    pairs = preferences.load(config.Data(name="local", train=[str(path)], held_out_share=0.0)).train[:num_pairs]
    if len(pairs) < num_pairs:
        raise UserError(f"{path} has {len(pairs)} pairs, and the benchmark needs {num_pairs}; set --pairs")
    characters = [
        (sum(len(turn["content"]) for turn in pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in pairs
    ]
    return _cut(np.array(characters) / 4)


def _cut(lengths: np.ndarray) -> np.ndarray:
    """Round to at least 2 tokens. Shorten prompts to half of MAX_TOKENS, then responses to what the prompt leaves."""
    whole = np.maximum(lengths.round(), 2).astype(int)
    whole[:, 0] = np.minimum(whole[:, 0], MAX_TOKENS // 2)
    whole[:, 1:] = np.minimum(whole[:, 1:], MAX_TOKENS - whole[:, :1])
    return whole


def shape(name: str) -> LlamaConfig:
    """The model configuration of a shape."""
    vocabulary, hidden, intermediate, layers, heads, key_value_heads = SHAPES[name]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=EOS,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one word per token, so that texts and token ids are equivalent."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, WORDS))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=MAX_TOKENS
    )


def text(ids: np.ndarray) -> str:
    """The text that this tokenizer encodes as these ids."""
    return "".join("</s>" if i == EOS else f" w{i}" for i in ids.tolist())
