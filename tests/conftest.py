"""What every test shares: the folder of real data, a tokenizer made in code, and tiny random models."""

import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

REAL_DATA = Path(os.environ.get("SDPO_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))

# Large enough to be a real architecture, small enough for a forward pass in milliseconds.
TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data():
    """The folder of real preference data, benchmarks and a small real model."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real data at {REAL_DATA}; set SDPO_REAL_DATA to the folder that holds it")
    return REAL_DATA


def byte_tokenizer():
    """A byte-level tokenizer (pad 0, bos 1, eos 2, then the 256 bytes) that needs no download."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def random_model(architecture="llama", seed=0, **overrides):
    """A tiny, randomly initialised causal language model of a real architecture, fp32, in eval mode."""
    config = AutoConfig.for_model(architecture, **{**TINY, **overrides})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def tiny_model():
    return random_model()
