"""Every backend against a dense softmax over the tokens that each token may see."""

import pytest
import torch
from conftest import random_model
from test_packing import rows_of
from torch.utils._python_dispatch import TorchDispatchMode

from sdpo.errors import UserError
from sdpo.model.attention import cuda as cuda_attention
from sdpo.model.attention import interface, sdpa
from sdpo.model.attention.cpu_blocks import attend_in_blocks
from sdpo.model.attention.interface import Flex, Rule, Sdpa, Varlen, own_attention
from sdpo.model.logprobs import Scorer, check_packing, naive_logprobs
from sdpo.model.packing import pack

PACK = pack(rows_of([(1, 1, 1), (5, 9, 3), (5, 9, 3), (1, 7, 1), (12, 1, 30), (70, 65, 3), (4, 3, 0)]))
SINKS_H = torch.tensor([-1.0, 0.0, 1.0, 2.0])
RULES = {
    "causal": Rule(None, None, None, None, 0.0),
    "window": Rule(0.3, 4, None, None, 0.0),
    "softcap": Rule(0.3, None, 2.0, None, 0.0),
    "sinks and window": Rule(0.3, 4, None, SINKS_H, 0.0),
}


def streams(seed=0):
    """Query with 4 heads, key and value with 2 heads, each of 8 dimensions."""
    torch.manual_seed(seed)
    return [torch.randn(len(PACK.tokens_T), heads, 8, requires_grad=True) for heads in (4, 2, 2)]


def dense(query_THD, key_THD, value_THD, rule, seen_TT):
    """Attention over the whole stream, step by step."""
    query, key, value = (x.transpose(0, 1) for x in (query_THD, key_THD, value_THD))
    key, value = key.repeat_interleave(2, 0), value.repeat_interleave(2, 0)
    scores = query @ key.mT * (rule.scale or 8**-0.5)
    if rule.softcap:
        scores = rule.softcap * (scores / rule.softcap).tanh()
    weights = scores.masked_fill(~seen_TT, -torch.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if rule.sinks_H is not None:
        total = total + rule.sinks_H.exp()[:, None, None]
    return (weights / total @ value).transpose(0, 1)


def seen(window):
    """The mask [T, T] of what each token of the stream sees, made from the list of sequences."""
    seen_TT = torch.zeros(len(PACK.tokens_T), len(PACK.tokens_T), dtype=torch.bool)
    for at, own in zip(PACK.keys_K.split(PACK.lengths_S), PACK.own_S, strict=True):
        for i in range(len(at) - own, len(at)):
            seen_TT[at[i], at[max(0, i + 1 - (window or len(at))) : i + 1]] = True
    return seen_TT


def slow_varlen(query, key, value, ends_q, ends_k, max_q, max_k, *, scale, window_size, **_):
    """FlashAttention's documented rule for fewer queries than keys: the last query is at the last key."""
    outputs, (left, right) = [], window_size
    assert right == 0 and ends_q.dtype == ends_k.dtype == torch.int32
    assert (int(ends_q[-1]), int(ends_k[-1])) == (len(query), len(key))
    for q0, q1, k0, k1 in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
        back = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)
        assert q1 - q0 <= max_q and k1 - k0 <= max_k
        visible = (back >= 0) & (back <= (left if left >= 0 else max_k))
        rule = Rule(scale, None, None, None, 0.0)
        outputs.append(dense(query[q0:q1], key[k0:k1], value[k0:k1], rule, visible))
    return torch.cat(outputs)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("backend", [Sdpa, Varlen, Flex])
def test_backends_equal_a_dense_softmax(backend, name, monkeypatch):
    monkeypatch.setattr(cuda_attention.varlen, "varlen_attn", slow_varlen)
    rule, inputs = RULES[name], streams()
    if backend is Varlen and (rule.softcap or rule.sinks_H is not None):
        with pytest.raises(UserError, match="choose launch.attention=sdpa"):
            Varlen(PACK)(*inputs, rule)
        return
    expected = dense(*inputs, rule, seen(rule.window))
    if backend is Flex:  # it has no backward pass on the CPU
        inputs = [x.detach() for x in inputs]
    output = backend(PACK)(*inputs, rule)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    if backend is not Flex:
        direction = torch.randn_like(expected)
        got, want = (torch.autograd.grad(x, inputs, direction) for x in (output, expected))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["bloom", "mamba", "stablelm"])
@pytest.mark.filterwarnings("ignore")
def test_models_that_cannot_share_prompts_are_refused_by_name_and_run_plain(architecture):
    model = random_model(architecture, **({"n_head": 4} if architecture == "bloom" else {}))
    with pytest.raises(UserError, match=f"(?i){architecture}.*launch.attention=plain"):
        Scorer(model)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
STATEFUL = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1, **EXPERTS},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "num_local_experts": 0,
        "shared_intermediate_size": 48,
    },
}
BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def twice(model):
    """The model with weights twice as large, so that every part of it matters."""
    with torch.no_grad():
        for param in (param for param in model.parameters() if param.dim() > 1):
            param.mul_(2)
    return model


@BOTH_DTYPES
@pytest.mark.parametrize("architecture", STATEFUL)
@pytest.mark.filterwarnings("ignore")
def test_layers_with_a_state_are_refused_in_every_precision_and_run_plain(architecture, dtype):
    """In bf16, what a rejected response reads of the chosen one is less than rounding may be."""
    model = twice(random_model(architecture, **STATEFUL[architecture])).to(dtype)
    with pytest.raises(UserError, match="layers carry a state.*launch.attention=plain"):
        Scorer(model)
    rows = rows_of([(5, 9, 3), (12, 1, 30)])
    with torch.no_grad():
        found = torch.stack(Scorer(model, "plain")(pack(rows)), 1)
        expected = torch.stack([torch.stack(naive_logprobs(model, row)) for row in rows])
    torch.testing.assert_close(found, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0)


@BOTH_DTYPES
def test_a_response_that_reads_another_one_is_refused_although_no_layer_declares_a_state(dtype, monkeypatch):
    monkeypatch.setattr(interface, "STATEFUL", set())
    model = random_model("lfm2", **STATEFUL["lfm2"]).to(dtype)  # in fp32, too, the log-probs look like the naive ones
    with pytest.raises(UserError, match="Lfm2.*would read those before it.*launch.attention=plain"):
        Scorer(model)


@BOTH_DTYPES
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mixtral"])
def test_models_whose_responses_are_apart_share_prompts_in_every_precision(architecture, dtype):
    settings = {"num_local_experts": 4} if architecture == "mixtral" else {}
    assert Scorer(twice(random_model(architecture, **settings)).to(dtype)).backend == "sdpa"


@pytest.mark.parametrize("architecture", ["mistral", "phimoe"])
def test_a_window_that_is_not_applied_is_refused_at_any_length_that_is_scored(architecture, monkeypatch):
    monkeypatch.setattr(sdpa, "attend_in_blocks", lambda q, k, v, scale, window: attend_in_blocks(q, k, v, scale, None))
    model = random_model(
        architecture, sliding_window=100, **({"num_local_experts": 4} if "moe" in architecture else {})
    )
    with pytest.raises(UserError, match=f"(?i){architecture}.*launch.attention=plain"):
        Scorer(model)
    scorer = Scorer(model, longest=99)  # no sequence is longer than the window
    with pytest.raises(UserError, match="cannot share prompts"):
        check_packing(scorer, longest=200)


def test_a_model_that_computes_with_its_mask_is_refused_by_name():
    with pytest.raises(UserError, match="DogeForCausalLM.*reads its mask.*launch.attention=plain"):
        Scorer(random_model("doge", sliding_window=8))


class Sizes(TorchDispatchMode):
    """Lists the dtypes of all tensors of at least so many elements that an operation makes."""

    def __init__(self, least):
        super().__init__()
        self.least, self.dtypes = least, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.untyped_storage().nbytes() >= self.least * found.element_size():
            self.dtypes.add(found.dtype)
        return found


@pytest.mark.parametrize("window", [None, 1, 4])
def test_the_mask_of_flex_is_made_of_booleans_alone(window):
    num_tokens = len(PACK.tokens_T)
    with Sizes(num_tokens**2) as made:
        mask = Flex(PACK)._mask(window)
    assert made.dtypes == {torch.bool}
    at = torch.arange(num_tokens)
    assert torch.equal(mask.mask_mod(0, 0, at[:, None], at), seen(window))


def test_own_attention_restores_the_model_and_the_error_without_a_pack_names_it(tiny_model):
    tokens = torch.tensor([[5, 6, 7]])
    before = tiny_model(tokens).logits
    Scorer(tiny_model)
    with own_attention(tiny_model):
        assert torch.equal(tiny_model(tokens).logits, before)
    with pytest.raises(UserError, match="own_attention"):
        tiny_model(tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize(("backend", "dtype"), [("sdpa", "float32"), ("flex", "float32"), ("auto", "bfloat16")])
def test_gpu_backends_equal_the_naive_forward_pass(backend, dtype, architecture):
    rows = rows_of([(1, 1, 1), (5, 9, 3), (12, 1, 30), (70, 65, 3), (4, 3, 0)])
    model = random_model(architecture, head_dim=16, sliding_window=8).to("cuda", getattr(torch, dtype))
    got = torch.stack(Scorer(model, attention=backend)(pack(rows).to("cuda")), 1)
    want = torch.stack([torch.stack(naive_logprobs(model, row)) for row in rows])
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-5)
    got, want = (torch.autograd.grad(logps.sum(), list(model.parameters())) for logps in (got, want))
    for ours, theirs in zip(got, want, strict=True):
        assert (ours - theirs).norm() <= 5 * tolerance * theirs.norm() + 1e-6
