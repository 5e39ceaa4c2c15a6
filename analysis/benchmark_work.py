"""What both sides of the benchmark run on: one folder with a random model, its tokenizer and pairs of token ids."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import lognorm
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sdpo.tokens import TokenPair

VOCABULARY, MAX_TOKENS = 8192, 1024
EOS = 2
# Mean tokens of prompt, chosen and rejected, of lognormals with as much spread as mean: they reproduce the published
# medians of ultrafeedback_binarized and orca_dpo_pairs (arXiv 2410.20305, table of data sets).
PROFILES = {"ultrafeedback": (160, 300, 265), "orca": (235, 195, 195)}


class Work(NamedTuple):
    """What a side needs to know; `folder` holds model, tokenizer and pairs."""

    folder: str
    pairs_per_update: int
    pairs_per_microbatch: int
    precision: str
    device: str

    @property
    def model(self) -> Path:
        return Path(self.folder) / "model"

    def rows(self) -> list[TokenPair]:
        listed = json.loads((Path(self.folder) / "pairs.json").read_text())
        return [TokenPair(f"{i:05d}", *(np.array(ids, np.int32) for ids in three)) for i, three in enumerate(listed)]


def prepare(work: Work, lengths: np.ndarray) -> None:
    """Write model, tokenizer and pairs of these lengths [N, 3]; everything is derived from seed 0."""
    rng = np.random.default_rng(0)
    pairs = []
    for prompt, chosen, rejected in lengths.tolist():
        ids = [rng.integers(3, VOCABULARY, n).tolist() for n in (prompt, chosen - 1, rejected - 1)]
        pairs.append([ids[0], [*ids[1], EOS], [*ids[2], EOS]])
    work.model.mkdir(parents=True)
    (Path(work.folder) / "pairs.json").write_text(json.dumps(pairs))
    tokenizer().save_pretrained(work.model)
    torch.manual_seed(0)
    toy().save_pretrained(work.model)


def from_profile(profile: str, num_pairs: int) -> np.ndarray:
    """Lengths [N, 3] at evenly spaced quantiles, shuffled apart: a small sample with the whole distribution."""
    rng = np.random.default_rng(0)
    quantiles = (np.arange(num_pairs) + 0.5) / num_pairs
    sigma = np.sqrt(np.log(2))  # standard deviation equal to the mean
    columns = [rng.permutation(lognorm.ppf(quantiles, sigma, scale=mean / np.sqrt(2))) for mean in PROFILES[profile]]
    return _cut(np.stack(columns, axis=1))


def from_file(path: Path, num_pairs: int) -> np.ndarray:
    """Lengths [N, 3] of the first pairs of a JSONL file with prompt, chosen and rejected, at 4 characters a token."""
    lines = path.read_text().splitlines()[:num_pairs]
    pairs = [json.loads(line) for line in lines]
    return _cut(
        np.array([[len(json.dumps(pair[key])) / 4 for key in ("prompt", "chosen", "rejected")] for pair in pairs])
    )


def _cut(lengths: np.ndarray) -> np.ndarray:
    """At least 2 tokens each, and no sequence longer than MAX_TOKENS, where responses give way."""
    whole = np.maximum(lengths.round(), 2).astype(int)
    whole[:, 0] = np.minimum(whole[:, 0], MAX_TOKENS // 2)
    whole[:, 1:] = np.minimum(whole[:, 1:], MAX_TOKENS - whole[:, :1])
    return whole


def toy() -> LlamaForCausalLM:
    """4.7 million parameters in the layers, 4.2 in embeddings and head: what one core trains in seconds."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


def tokenizer() -> PreTrainedTokenizerFast:
    """One word a token, so that text and ids say the same on both sides."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=MAX_TOKENS
    )


def text(ids: np.ndarray) -> str:
    """The words of some ids, which this tokenizer reads back as the same ids."""
    return "".join("</s>" if i == EOS else f" w{i}" for i in ids.tolist())
