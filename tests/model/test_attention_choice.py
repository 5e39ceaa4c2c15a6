"""Which attention kernel a model gets, what a named kernel needs, and how FlexAttention's are built."""

from types import SimpleNamespace

import pytest
import torch
from conftest import random_model

from sdpo.errors import UserError
from sdpo.model.attention.cuda import kernel_options
from sdpo.model.attention.interface import choose_backend, head_sizes, reshapes_scores
from sdpo.model.logprobs import Scorer

MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
MLA |= {"head_dim": 16, "num_key_value_heads": 4, "first_k_dense_replace": 2}


@pytest.mark.filterwarnings("ignore:.*RoPE")
@pytest.mark.parametrize(
    ("architecture", "more", "sizes", "chosen"),
    [
        ("llama", {"head_dim": 256}, (256, 256), "varlen"),
        ("llama", {"head_dim": 512}, (512, 512), "sdpa"),
        ("llama", {"head_dim": 36}, (36, 36), "sdpa"),
        ("gemma2", {"head_dim": 512}, (512, 512), "sdpa"),
        ("gemma2", {"head_dim": 36}, (36, 36), "flex"),
        ("gpt2", {}, (8, 8), "varlen"),
        ("deepseek_v3", MLA, (48, 32), "flex"),
        ("deepseek_v3", MLA | {"v_head_dim": 8}, (48, 8), "sdpa"),
    ],
)
def test_auto_takes_a_backend_that_has_the_sizes_of_the_heads(architecture, more, sizes, chosen):
    scorer = Scorer(random_model(architecture, **more), longest=16)
    assert scorer.backend == "sdpa"
    del scorer.head  # a module, in whose place nothing else can be put
    scorer.head = SimpleNamespace(weight=SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16))
    assert (head_sizes(scorer.model), scorer.backend) == ({sizes}, chosen)


@pytest.mark.filterwarnings("ignore:.*RoPE")
def test_the_backend_depends_on_device_precision_and_model():
    cuda, cpu, size = torch.device("cuda"), torch.device("cpu"), {(16, 16)}
    assert choose_backend("auto", cpu, torch.bfloat16, False, size) == "sdpa"
    assert choose_backend("auto", cuda, torch.float32, False, size) == "sdpa"
    assert choose_backend("auto", cuda, torch.bfloat16, False, size) == "varlen"
    assert choose_backend("auto", cuda, torch.bfloat16, True, size) == "flex"
    assert choose_backend("flex", cuda, torch.float32, False, size) == "flex"
    assert [reshapes_scores(random_model(name)) for name in ("llama", "gemma2", "gpt_oss")] == [False, True, True]


@pytest.mark.parametrize(
    ("attention", "device", "dtype", "softcap", "size", "lack"),
    [
        ("varlen", "cpu", "bfloat16", False, (16, 16), "a GPU"),
        ("flex", "cpu", "bfloat16", False, (16, 16), "a GPU"),
        ("varlen", "cuda", "float32", False, (16, 16), "precision=bf16"),
        ("varlen", "cuda", "bfloat16", True, (16, 16), "soft caps"),
        ("varlen", "cuda", "bfloat16", False, (48, 32), "values that are as large as keys"),
        ("varlen", "cuda", "bfloat16", False, (36, 36), "a multiple of 8"),
        ("varlen", "cuda", "bfloat16", False, (512, 512), "heads of 1 to 256, and this model's have 512"),
        ("flex", "cuda", "bfloat16", False, (16, 8), "heads of 16 to 256, and this model's have 8, 16"),
    ],
)
def test_a_named_backend_that_cannot_run_is_refused(attention, device, dtype, softcap, size, lack):
    with pytest.raises(UserError, match=f"launch.attention={attention} needs .*{lack}.*use launch.attention=auto"):
        choose_backend(attention, torch.device(device), getattr(torch, dtype), softcap, {size})


@pytest.mark.parametrize(
    ("shared_memory", "size", "dtype", "stages", "tile"),
    [  # of a thread block, in bytes: H100, A100, RTX 4090
        (232_448, 256, torch.bfloat16, None, None),
        (166_912, 256, torch.bfloat16, None, None),
        (101_376, 128, torch.bfloat16, None, None),
        (101_376, 192, torch.bfloat16, 1, 32),
        (101_376, 64, torch.float32, None, None),
        (101_376, 128, torch.float32, 1, None),
    ],
)
def test_flex_takes_small_tiles_where_others_have_no_room(shared_memory, size, dtype, stages, tile, monkeypatch):
    properties = SimpleNamespace(shared_memory_per_block_optin=shared_memory)  # a mock: there is no such card
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    query = SimpleNamespace(
        is_cuda=True, device=None, shape=(1, 1, size), element_size=lambda: dtype.itemsize, dtype=dtype
    )
    options = kernel_options(query)
    assert (options["BACKEND"], options.get("num_stages"), options.get("bwd_BLOCK_M2")) == ("TRITON", stages, tile)
