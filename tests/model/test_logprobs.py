"""Packed log-probs and gradients against the model's own forward pass, one sequence at a time."""

import ctypes
import gc
import weakref

import numpy as np
import pytest
import torch
from conftest import random_model, rounds_rows_alike

from analysis.benchmark.meter import Meter
from sdpo.model import head
from sdpo.model.attention.interface import own_attention
from sdpo.model.head import Head
from sdpo.model.logprobs import Scorer, naive_logprobs, score
from sdpo.model.packing import pack
from sdpo.types import TokenPair

# A sliding window shorter than the sequences, and every scaling switched on.
ARCHITECTURES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {
        "sliding_window": 8,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi3": {"sliding_window": 8},
    "olmo2": {},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512},
    "gpt_neox": {"num_key_value_heads": None},
    "mixtral": {"sliding_window": 8, "num_local_experts": 4},
    "smollm3": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.2},
    "gpt_oss": {"sliding_window": 8, "num_local_experts": 4},
    "phi": {},  # its head has a bias
    # Two models whose window is in the mask alone.
    "phimoe": {"sliding_window": 8, "num_local_experts": 4},
    "qwen2_moe": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}


def row(name, *lengths, seed=0):
    rng = np.random.default_rng([seed, *lengths])
    return TokenPair(name, *(rng.integers(3, 300, n).astype(np.int32) for n in lengths))


def ragged():
    """Pairs of length 1, of equal shapes, one giant, one without a rejected response, one with a shared prefix."""
    lengths = [(1, 1, 1), (5, 9, 3), (1, 7, 1), (12, 1, 30), (70, 65, 33), (5, 9, 3), (3, 4, 0)]
    rows = [row(str(i), *three, seed=i) for i, three in enumerate(lengths)]
    prompt, chosen = rows[1].prompt, rows[1].chosen
    return [*rows, TokenPair("prefix", prompt, chosen, np.concatenate([chosen[:6], [7, 8]]).astype(np.int32))]


def louder(model):
    """Make weights four times as large and biases nonzero, so that every part of the model matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(4) if param.dim() > 1 else param.add_(torch.randn_like(param), alpha=0.1)
    return model


def test_sums_with_weights_of_tokens():
    """The sums of weight * log-prob, and their gradients, of rows with and without weights in one pack."""
    model, rng = louder(random_model()), np.random.default_rng(0)
    rows = [
        row._replace(weights=tuple(rng.random(len(ids)).astype(np.float32) for ids in row.ids[1:])) if i % 2 else row
        for i, row in enumerate(ragged())
    ]

    def by_hand(row, branch):
        response = row.ids[1 + branch]
        tokens = torch.from_numpy(np.concatenate([row.prompt, response]).astype(np.int64))[None]
        logps = model(tokens).logits[0].log_softmax(-1)[len(row.prompt) - 1 : -1]
        weights = torch.ones(len(response)) if row.weights is None else torch.from_numpy(row.weights[branch])
        return sum((w * logp[t] for w, logp, t in zip(weights, logps, response, strict=True)), torch.zeros(()))

    expected_B2 = torch.stack([torch.stack([by_hand(row, branch) for branch in (0, 1)]) for row in rows])
    found_B2 = torch.stack(Scorer(model, "plain")(pack(rows)), 1)
    torch.testing.assert_close(found_B2, expected_B2, rtol=1e-4, atol=1e-4)
    naive_B2 = torch.stack([torch.stack(naive_logprobs(model, row)) for row in rows])
    torch.testing.assert_close(naive_B2, expected_B2, rtol=1e-4, atol=1e-4)
    expected, found = gradients(model, expected_B2), gradients(model, found_B2)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere", "phi"])  # plain; soft cap; scale; bias
@pytest.mark.parametrize("kept_bytes", [0, 2**30])
def test_divergence_from_a_reference_and_its_gradient(architecture, kept_bytes, monkeypatch):
    """Sums of KL(reference || policy) over response tokens, from both models' logits; both sums get gradients."""
    monkeypatch.setitem(head.TILE_BYTES, "cpu", 4 * 300 * 5)
    monkeypatch.setattr(head, "KEPT_BYTES", kept_bytes)
    settings, rows = ARCHITECTURES[architecture], ragged()
    model, other = (louder(random_model(architecture, seed=seed, **settings)) for seed in (0, 1))
    reference = Scorer(other.requires_grad_(False))

    def by_hand(row, branch):
        response = row.ids[1 + branch]
        tokens = torch.from_numpy(np.concatenate([row.prompt, response]).astype(np.int64))[None]
        with own_attention(model), own_attention(other):
            logps, others = (of(tokens).logits[0, len(row.prompt) - 1 : -1].log_softmax(-1) for of in (model, other))
        return (others.exp() * (others - logps)).sum()

    expected_B2 = torch.stack([torch.stack([by_hand(row, branch) for branch in (0, 1)]) for row in rows])
    expected_B4 = torch.cat([naive(model, rows), expected_B2], 1)
    logps, divergence = Scorer(model)(pack(rows), reference)
    found_B4 = torch.stack([*logps, *divergence], 1)
    torch.testing.assert_close(found_B4, expected_B4, rtol=1e-5, atol=1e-5)
    found, expected = gradients(model, found_B4), gradients(model, expected_B4)
    largest = max(grad.norm() for grad in expected.values())
    for name in expected:
        assert (found[name] - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-7 * largest, name


def test_a_model_does_not_diverge_from_itself():
    model = louder(random_model())
    _, divergence = Scorer(model)(pack(ragged()), Scorer(louder(random_model()).requires_grad_(False)))
    assert not any(sums_B.any() for sums_B in divergence)
    assert all(gradient.abs().max() < 1e-5 for gradient in gradients(model, torch.stack(divergence, 1)).values())


def gradients(model, logps_B2):
    """The gradients of a fixed random combination of log-probs, by parameter name."""
    weights_B2 = torch.randn(logps_B2.shape, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    (logps_B2 * weights_B2).sum().backward()
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def naive(model, rows):
    return torch.stack([torch.stack(naive_logprobs(model, row)) for row in rows])


def packed(scorer, rows):
    return torch.stack(scorer(pack(rows)), 1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore:.*RoPE")
def test_packed_equals_naive_in_value_and_gradient(architecture):
    model, rows = louder(random_model(architecture, **ARCHITECTURES[architecture])), ragged()
    scorer = Scorer(model)
    got, want = packed(scorer, rows), naive(model, rows)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    got, want = gradients(model, got), gradients(model, want)
    assert got.keys() == want.keys()
    largest = max(grad.norm() for grad in want.values())
    for name in want:  # without rotary positions, the gradient of a key's bias is 0 and its norm is noise
        assert (got[name] - want[name]).norm() <= 1e-5 * want[name].norm() + 1e-8 * largest, name


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2", "phi"])
def test_a_pair_has_the_same_bits_in_every_pack(architecture):
    scorer = Scorer(louder(random_model(architecture, **ARCHITECTURES[architecture])))
    rows = ragged()
    with torch.no_grad():
        together = packed(scorer, rows)
        apart = torch.cat([packed(scorer, rows[i : i + n]) for i, n in [(0, 1), (1, 3), (4, 1), (5, 3)]])
        turned = packed(scorer, rows[::-1]).flip(0)
    most = 0 if rounds_rows_alike() else 1e-6
    for other in (apart, turned):
        torch.testing.assert_close(other, together, rtol=most, atol=0)
    # Training, where the head keeps its logits, gives the same bits as scoring.
    assert torch.equal(packed(scorer, rows).detach(), together)


def test_scoring_keeps_the_order_of_rows_and_the_training_mode():
    scorer, rows = Scorer(louder(random_model("llama"))), ragged()
    scorer.train()
    done = []
    logps_N2 = score(scorer, rows, tokens_per_pack=60, progress=done.append)  # the giant has more
    assert scorer.training and sum(done) == len(rows) and len(done) > 2
    assert logps_N2.dtype == np.float32
    with torch.no_grad():
        assert np.array_equal(logps_N2, packed(scorer, rows).numpy())


def test_plain_attention_runs_models_that_cannot_share_prompts():
    model, rows = louder(random_model("bloom", n_head=4)), ragged()
    got, want = packed(Scorer(model, attention="plain"), rows), naive(model, rows)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients(model, got), gradients(model, want), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad", "ignore:.*deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_sees_the_same_pack(reentrant):
    model, rows = louder(random_model("llama")), ragged()
    scorer = Scorer(model)
    want = {name: grad.clone() for name, grad in gradients(model, packed(scorer, rows)).items()}
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    scorer.train()
    got = gradients(model, packed(scorer, rows))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_zero_pairs_give_every_parameter_a_gradient_of_zero():
    scorer = Scorer(random_model("llama"))
    chosen, rejected = scorer(pack([]))
    assert chosen.shape == rejected.shape == (0,)
    (chosen.sum() - rejected.sum()).backward()
    assert all(not param.grad.any() for param in scorer.parameters())


@pytest.mark.parametrize("architecture", ["gemma2", "phi"])
def test_head_tiles_and_recomputation_change_no_gradient(architecture, monkeypatch):
    model, rows, found = louder(random_model(architecture, **ARCHITECTURES[architecture])), ragged(), []
    want = {name: grad.clone() for name, grad in gradients(model, packed(Scorer(model), rows)).items()}
    monkeypatch.setitem(head.TILE_BYTES, "cpu", 4 * 300 * 5)
    for room in (0, 2**30):  # recomputed, kept
        monkeypatch.setattr(head, "KEPT_BYTES", room)
        found.append({name: grad.clone() for name, grad in gradients(model, packed(Scorer(model), rows)).items()})
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(found[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kept_bytes", "survivors"), [(2**20, 0), (2**30, 4)])
def test_head_tiles_are_small_and_only_kept_within_the_budget(kept_bytes, survivors, monkeypatch):
    """32k vocabulary, 609 response tokens."""
    scorer, tiles, compute = Scorer(random_model("llama", vocab_size=32_000, num_hidden_layers=1)), [], head._logits

    def logits(*args):
        tiles.append(weakref.ref(tile := compute(*args)))
        assert tile.nbytes <= 2 * head.TILE_BYTES["cpu"]
        return tile

    monkeypatch.setattr(head, "KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(head, "_logits", logits)
    both = packed(scorer, [row("long", 5, 305, 300)])
    assert (len(tiles), sum(tile() is not None for tile in tiles)) == (4, survivors)
    both.sum().backward()
    assert all(tile() is None for tile in tiles)


@pytest.mark.parametrize(("kept_bytes", "share"), [(head.KEPT_BYTES, 0), (2**40, 1)])
def test_head_memory_does_not_grow_with_vocabulary_times_tokens(kept_bytes, share, monkeypatch):
    """32k vocabulary: how the peak memory of forward and backward pass grows with 4096 more response tokens."""
    monkeypatch.setattr(head, "KEPT_BYTES", kept_bytes)
    project, more = Head(random_model("llama", vocab_size=2**15, num_hidden_layers=1)), 4096

    def peak_bytes(num_tokens):
        gc.collect()  # what is freed in the middle of a pass would be used again
        ctypes.CDLL(None).malloc_trim(0)  # so would memory that earlier passes freed
        hidden_RH, meter = torch.randn(num_tokens, 32, requires_grad=True), Meter("cpu")
        project(hidden_RH, torch.arange(num_tokens))[0].sum().backward()
        return meter.result()["peak_bytes"]

    peak_bytes(more // 2)  # the first pass allocates more
    grown = peak_bytes(2 * more) - peak_bytes(more)
    assert abs(grown / (4 * more * 2**15) - share) < 0.25  # the allocator may keep some tiles


def test_half_precision_weights_sum_in_full_precision():
    model = louder(random_model("llama")).bfloat16()
    with torch.no_grad():
        got, want = packed(Scorer(model), ragged()), naive(model, ragged())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-2, atol=0)
