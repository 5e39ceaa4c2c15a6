"""What every test shares: the folder of real data, a tokenizer made in code, and tiny random models."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from sdpo import config as configuration
from sdpo.model.engine import has_bf16

CHECKOUT = Path(__file__).parents[1]
CONF = CHECKOUT / "conf"
REAL_DATA = Path(os.environ.get("SDPO_REAL_DATA", CHECKOUT.parent / "shared" / "data"))

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


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    # Processes that share the files begin with the slow ones, so that they end together.
    items.sort(key=lambda item: "slow" not in item.keywords)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data():
    """The folder of real preference data, benchmarks and a small real model."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real data at {REAL_DATA}; set SDPO_REAL_DATA to the folder that holds it")
    return REAL_DATA


@pytest.fixture(scope="session")
def real_model():
    """The folder of SmolLM2-135M-Instruct, a chat model whose BOS token also opens every turn."""
    folder = os.environ.get("SDPO_REAL_MODEL")
    if not folder:
        pytest.skip("no real chat model; set SDPO_REAL_MODEL to the folder of SmolLM2-135M-Instruct")
    return Path(folder)


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
def bos_tokenizer():
    """Adds BOS by itself, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture
def tiny_model():
    return random_model()


def compose(*overrides):
    """The typed configuration that `python train.py OVERRIDES` would run."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return configuration.from_composed(hydra_compose("config", overrides=list(overrides)))


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with a tiny model and three sources of 24 ragged pairs each, a.jsonl, b.jsonl and c.jsonl."""
    folder = tmp_path_factory.mktemp("toy")
    random_model().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    rng = random.Random(0)

    def words(most):
        return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(1, 7))) for _ in range(rng.randint(1, most)))

    for source in "abc":
        pairs = [{"prompt": words(5) + f" {n}", "chosen": words(6), "rejected": words(4) + "."} for n in range(24)]
        (folder / f"{source}.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return folder


@pytest.fixture
def run(toy, tmp_path, monkeypatch):
    """run(*overrides, name="run") trains on the toy in this process and store; returns the run folder."""
    from sdpo import stepwise
    from sdpo.run import folder as run_folder

    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "store"))
    files = ",".join(str(toy / f"{source}.jsonl") for source in "abc")
    base = ["model=local", f"model.path={toy / 'model'}", "data=local", f"data.train=[{files}]"]
    base += ["data.template=plain", "data.held_out_share=0.1", "optim.lr=3e-3", "optim.pairs_per_update=8"]

    def train(*overrides, name="run"):
        settings = compose(*base, *overrides)
        folder = tmp_path / name
        run_folder.Run(settings, folder, choices={}, arm=name).prepare()
        stepwise.run(settings, folder)
        return folder

    return train


needs_bf16 = pytest.mark.skipif(
    not has_bf16(torch.device("cpu")), reason="this processor has no bf16 arithmetic: neither avx512_bf16 nor AMX"
)


def rounds_rows_alike():
    """Whether a row of a product has the same bits whatever the other rows are. With MKL_CBWR=COMPATIBLE it has not."""
    torch.manual_seed(0)
    rows, weight = torch.randn(13, 32), torch.randn(48, 32)
    whole = linear(rows, weight)
    return all(torch.equal(linear(rows[:num], weight), whole[:num]) for num in range(4, 13))


def read_lines(folder, kind):
    """The entries of one kind in a run's metrics.jsonl."""
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in entries if entry["kind"] == kind]
