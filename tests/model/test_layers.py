"""Fused kernels and compiled graphs: only packs use them, and they change nothing but the last digits."""

import gc
import sys
import weakref
from functools import partial
from types import ModuleType

import pytest
import torch
from conftest import compose, random_model
from test_logprobs import gradients, louder, naive, packed, ragged, row
from torch.nn.functional import rms_norm
from transformers.models.llama import modeling_llama

from sdpo.errors import UserError
from sdpo.model import layers
from sdpo.model.logprobs import Scorer
from sdpo.train.numerics import Numerics


@pytest.fixture
def kernels(monkeypatch):
    """A stand-in for liger-kernel, which needs a GPU: it changes a Llama in the same places. Lists what was called."""
    calls, rotary = [], modeling_llama.apply_rotary_pos_emb

    class Norm(torch.nn.Module):
        def forward(self, hidden):
            calls.append("norm")
            return rms_norm(hidden, hidden.shape[-1:], self.weight + self.offset, self.variance_epsilon)

    def mlp(self, hidden):
        calls.append("mlp")
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))

    def rotate(*arguments, **more):
        calls.append("rotary")
        return rotary(*arguments, **more)

    def apply(model, **losses):
        assert losses == layers.NO_LOSSES
        modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm = rotate, Norm
        for module in model.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.offset, module.forward = 0.0, Norm.forward.__get__(module)
            if type(module).__name__ == "LlamaMLP":
                module.forward = mlp.__get__(module)

    patch = ModuleType("liger_kernel.transformers.monkey_patch")
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN, patch._apply_liger_kernel_to_instance = {"llama": apply}, apply
    package = ModuleType("liger_kernel.transformers")
    package.monkey_patch = patch
    for module in (ModuleType("liger_kernel"), package, patch):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_only_packs_run_through_fused_kernels(kernels):
    model, rows = louder(random_model()), ragged()
    scorer, before = Scorer(model), dict(vars(modeling_llama))
    plain = packed(scorer, rows)
    plain_gradients = {name: grad.clone() for name, grad in gradients(model, plain).items()}
    assert layers.fuse(model)
    assert vars(modeling_llama) == before and "forward" not in vars(model.model.layers[0].mlp)
    want = naive(model, rows)
    assert kernels == []
    got = packed(scorer, rows)
    assert kernels == ["norm", "rotary", "norm", "mlp"] * 2  # layers
    assert vars(modeling_llama) == before and "forward" not in vars(model.model.layers[0].mlp)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    fused = {name: grad.clone() for name, grad in gradients(model, got).items()}
    torch.testing.assert_close(fused, plain_gradients, rtol=1e-3, atol=1e-3)
    kernels.clear()
    for _ in range(2):  # the second time changes nothing
        layers.recompute_activations(model)
    recomputed = gradients(model, packed(scorer, rows))
    assert kernels == ["norm", "rotary", "norm", "mlp"] * 4
    torch.testing.assert_close(recomputed, fused, rtol=0, atol=0)


def test_other_types_stay_as_they_are_and_a_fused_model_is_freed(kernels):
    cuda, chosen = torch.device("cuda"), compose("launch.kernels=liger").launch
    assert not layers.fuse(random_model("qwen2"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "find_spec", lambda name: True)
        patch.setattr(layers, "can_build", lambda: True)
        assert layers.prepare(random_model(), chosen, cuda) == "liger"
        with pytest.raises(UserError, match="does not know the type qwen2"):
            layers.prepare(random_model("qwen2"), chosen, cuda)
    model = random_model()
    layers.fuse(model)
    gc.collect()
    gc.disable()
    try:
        alive = weakref.ref(model)
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_the_key_names_kernels_that_are_not_pytorchs(monkeypatch):
    monkeypatch.setattr(layers, "find_spec", lambda name: name == "liger_kernel" or None)
    monkeypatch.setattr(layers, "can_build", lambda: True)
    assert "kernels" not in Numerics(compose("launch.device=cpu")).all
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_gpu = {"": "liger", "launch.kernels=plain": None, "launch.compile=true": None, "launch.attention=plain": None}
    for more, found in on_gpu.items():
        numerics = Numerics(compose("launch.device=cuda", *more.split()))
        assert numerics.all.get("kernels") == numerics.of_logprobs().get("kernels") == found
        assert "kernels" not in numerics.of_packs()
    with pytest.raises(UserError, match="needs a GPU"):
        Numerics(compose("launch.device=cpu", "launch.kernels=liger"))


def test_without_a_c_compiler_or_headers_layers_run_as_their_model_defines_them(tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "find_spec", lambda name: True)
    monkeypatch.setattr(layers.sysconfig, "get_path", lambda name, scheme: str(tmp_path / name))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    cuda, auto, liger = torch.device("cuda"), compose().launch, compose("launch.kernels=liger").launch
    for name, follows in (("include/Python.h", "plain"), ("clang", "liger")):
        assert layers.kernels_of(auto, cuda) == "plain"
        assert layers.prepare(random_model(), auto, cuda) == "plain, because Triton finds no C compiler or no Python.h"
        with pytest.raises(UserError, match="needs .* a C compiler and Python's headers"):
            layers.kernels_of(liger, cuda)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch(0o755)
        assert layers.kernels_of(auto, cuda) == follows
    monkeypatch.setenv("CC", "missing")  # it decides
    assert layers.kernels_of(auto, cuda) == "plain"


@pytest.mark.parametrize("architecture", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:::torch")  # the compiler's own warnings
def test_graphs_are_compiled_for_the_first_pack_only(architecture, monkeypatch):
    """The first pack has as many tokens as the hidden size; others as the head's size, or as there are heads."""
    torch._dynamo.reset()  # tests before this one may have compiled as often as it allows
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(layers, "_compiled", partial(torch.compile, backend=count, dynamic=True))
    model = louder(random_model(architecture, **({"sliding_window": 8} if architecture == "gemma2" else {})))
    scorer = Scorer(model)
    layers.compile_layers(model)
    naive(model, [row("naive", 5, 6, 7)])
    assert graphs == []
    expected, num_first = naive(model, ragged()), 0
    for rows in [
        [row("first", 11, 9, 13)],
        ragged(),
        *([row(str(n), n - 3, 2, 2)] for n in (4, 8, 16, 31, 32, 33, 48)),
    ]:
        gradients(model, packed(scorer, rows))
        num_first = num_first or len(graphs)
        assert 0 < len(graphs) == num_first, (rows[0].id, len(graphs))
    torch.testing.assert_close(packed(scorer, ragged()), expected, rtol=1e-5, atol=0)
