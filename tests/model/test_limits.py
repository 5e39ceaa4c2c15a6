"""Rows with tokens or positions that a model does not have are refused by name, before any work."""

import re
import shutil

import pytest
from conftest import random_model
from test_logprobs import row
from transformers import AutoConfig

from sdpo.errors import UserError
from sdpo.model import rotary
from sdpo.model.limits import check_rows


@pytest.mark.parametrize(
    ("architecture", "settings", "sentence"),
    [
        ("llama", {"vocab_size": 100}, "[abc].jsonl, row [0-9]+ has token [0-9]{3}, but the model .* knows 100 tokens"),
        (
            "gpt2",
            {"max_position_embeddings": 60},
            "[abc].jsonl, row [0-9]+ has [0-9]+ tokens, .* at most 60; set data.max_tokens=60",
        ),
        ("llama", {"max_position_embeddings": 60}, "at most 60; set data.max_tokens=60"),
    ],
)
def test_a_run_is_refused_before_any_work(run, toy, tmp_path, architecture, settings, sentence):
    model = tmp_path / "model"
    shutil.copytree(toy / "model", model)
    random_model(architecture, **settings).save_pretrained(model)
    with pytest.raises(UserError, match=sentence):
        run(f"model.path={model}")
    assert not list((tmp_path / "store").glob("*/*/manifest.json"))
    if "max_tokens" in sentence:
        run(f"model.path={model}", "data.max_tokens=60", "data.on_long=drop", "split=all_at_once")


def test_the_last_position_and_the_last_token_are_readable(tmp_path):
    random_model(max_position_embeddings=12, vocab_size=300).save_pretrained(tmp_path)
    fits = row("fits", 5, 7, 3)
    fits.chosen[-1] = 299
    check_rows([fits], tmp_path)
    with pytest.raises(UserError, match=re.escape("row long has 13 tokens")):
        check_rows([fits, row("long", 5, 3, 8)], tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_scaling_of_rotary_frequencies_extends_the_limit():
    def longest(named, **rope):
        rope = {"rope_theta": 1e4, **rope}
        return rotary.longest_readable(
            AutoConfig.for_model("llama", max_position_embeddings=named, rope_parameters=rope)
        )

    assert longest(64, rope_type="default") == 64
    assert longest(64, rope_type="linear", factor=2.0) == 128
    assert longest(64, rope_type="dynamic", factor=4.0) == 256
    assert longest(64, rope_type="yarn", factor=4.0, original_max_position_embeddings=64) == 256
    assert longest(256, rope_type="yarn", factor=4.0, original_max_position_embeddings=64) == 256
    ramp = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert longest(1024, rope_type="llama3", factor=8.0, original_max_position_embeddings=64, **ramp) == 1024
    assert rotary.longest_readable(AutoConfig.for_model("mamba")) == float("inf")
