"""Memory that really runs out: the address space is limited, so that allocations fail."""

import ctypes
import gc
import os
import resource
import subprocess
import sys
import weakref
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CHECKOUT, compose, random_model, read_lines

from sdpo.config import Optim
from sdpo.errors import UserError
from sdpo.model import layers, memory
from sdpo.model.engine import Plain, open_engine
from sdpo.model.logprobs import Scorer, score
from sdpo.model.packing import pack, tokens_of
from sdpo.model.parameters import growth, moments_of
from sdpo.types import TokenPair

CPU = torch.device("cpu")


@contextmanager
def memory_left(megabytes):
    """Context in which this process can allocate this much more memory, and cannot reuse memory that it freed."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: freed memory is unmapped, not kept
    libc.malloc_trim(0)
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped, before[1]))
    holes = [hole for size in (2**20, 2**16) for hole in iter(partial(libc.malloc, size), None)]
    resource.setrlimit(resource.RLIMIT_AS, (mapped + megabytes * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        for hole in holes:
            libc.free(hole)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, ""),
    ],
)
def test_the_gpu_s_memory_grows_in_segments_unless_the_user_says_otherwise(given, expected):
    code = "import os, sdpo.distributed; print(os.environ.get('PYTORCH_ALLOC_CONF', ''))"
    env = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name} | given
    found = subprocess.run([sys.executable, "-c", code], env=env, cwd=CHECKOUT, capture_output=True, text=True)
    assert found.stdout.strip() == expected, found.stderr


def test_a_model_that_only_scores_has_no_masters_and_no_optimizer():
    scorer = Scorer(random_model().requires_grad_(False))
    config = compose("deepspeed=zero2")
    opened = open_engine(scorer, config.optim, config.precision, config.deepspeed, CPU)
    assert not hasattr(opened, "optimizer") and opened.parts == []
    assert opened.weights().keys() == dict(scorer.named_parameters()).keys()


def rows_of(*lengths):
    """Rows r0, r1, ... with these numbers of prompt, chosen and rejected tokens."""
    return [TokenPair(f"r{i}", *(np.full(n, 3 + n % 290, np.int32) for n in three)) for i, three in enumerate(lengths)]


def engine_of(*overrides):
    """An engine and its launch settings. Activations take 1 MB per token, gradients and moments 100 MB in all."""
    config = compose(*overrides)
    scorer = Scorer(random_model(num_hidden_layers=8, intermediate_size=8192))
    return open_engine(scorer, config.optim, config.precision, config.deepspeed, CPU), config.launch


def gradients(scorer, rows):
    scorer.zero_grad()
    policy = scorer(pack(rows))
    (policy.chosen - 2 * policy.rejected).sum().backward()
    return {name: param.grad.clone() for name, param in scorer.named_parameters() if param.grad is not None}


def adapted():
    from peft import LoraConfig, LoraModel

    model = random_model()
    LoraModel(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_dropout=0.3), "fresh")
    return model.train()


@pytest.mark.parametrize("make", [random_model, lambda: random_model("gemma2"), lambda: random_model("gpt2"), adapted])
def test_recomputed_activations_give_the_same_gradients(make):
    scorer = Scorer(make())
    rows = rows_of((5, 9, 4), (1, 3, 12), (30, 1, 7))
    torch.manual_seed(1)
    kept = gradients(scorer, rows)
    layers.recompute_activations(scorer.model)
    torch.manual_seed(1)
    again = gradients(scorer, rows)
    assert kept.keys() == again.keys() and kept
    for name, gradient in kept.items():
        torch.testing.assert_close(again[name], gradient, rtol=0, atol=0)


def test_an_engine_that_recomputes_is_freed_without_the_garbage_collector():
    gc.disable()
    try:
        engine, _ = engine_of()
        layers.recompute_activations(engine.scorer.model)
        score(engine.scorer, rows_of((3, 3, 3)), 100)
        model = weakref.ref(engine.scorer.model)
        del engine
        assert model() is None
    finally:
        gc.enable()


def test_the_budget_is_halved_until_the_heaviest_micro_batch_fits(capsys):
    engine, launch = engine_of("launch.tokens_per_pack=400")
    updates = [rows_of((9, 9, 9)), rows_of(*[(9, 9, 9)] * 14)]
    with memory_left(300):
        budget = memory.fitting_budget(engine, updates, launch)
        memory._run_once(engine, memory._heaviest(updates, budget), None)
    assert budget in (50, 100, 200)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"launch.tokens_per_pack={budget} launch.recompute_activations=false" in said
    assert not engine.optimizer.state and all(param.grad is None for param in engine.scorer.parameters())
    assert memory.fitting_budget(engine, updates, launch) == 400  # without a limit, no trial is run


def test_activations_are_recomputed_if_a_pair_does_not_fit_alone(capsys):
    engine, launch = engine_of("launch.tokens_per_pack=50")
    updates = [rows_of((9, 9, 9), (110, 90, 102))]
    with memory_left(250):
        assert memory.fitting_budget(engine, updates, launch) == 50
    assert "launch.tokens_per_pack=50 launch.recompute_activations=true" in capsys.readouterr().err


def test_the_error_names_a_pair_that_never_fits():
    engine, launch = engine_of()
    with memory_left(40), pytest.raises(UserError, match=r"pair r1 \(300 tokens\) does not fit"):
        memory.fitting_budget(engine, [rows_of((9, 9, 9), (110, 90, 102))], launch)


@pytest.mark.parametrize("states", ["fp32", "host"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_trial_holds_as_much_as_the_first_update_adds(precision, states, monkeypatch):
    """The sums of gradients and the moments; a gradient that has its sum is held by nobody."""
    engine = Plain(Scorer(random_model(), "sdpa"), Optim(states=states), precision, CPU)
    rows, held, find = rows_of((9, 9, 9), (30, 1, 7)), [], torch.autograd.grad
    monkeypatch.setattr(memory, "growth", lambda *asked: held.extend(growth(*asked)) or held)
    monkeypatch.setattr(torch.autograd, "grad", lambda *asked, **more: held.extend(find(*asked, **more)) or held)
    memory._run_once(engine, rows, None)
    engine.backward(torch.stack(list(engine.module(pack(rows)))).sum(), last=True)
    added = sum(total.grad.nbytes for total in engine.sums)
    engine.update(1e-3)
    added += sum(moment.nbytes for each in engine.parts for moment in moments_of(engine.optimizer, each).values())
    num_weights = sum(param.numel() for param in engine.params.values())
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) == pytest.approx(added, abs=4 * len(held))
    assert added == pytest.approx(12 * num_weights, abs=4 * len(held))
    assert all(
        total.grad is None and not param._backward_hooks
        for param, total in zip(engine.params.values(), engine.sums, strict=True)
    )


def test_all_ranks_halve_if_one_of_them_runs_out(monkeypatch):
    engine, launch = engine_of("launch.tokens_per_pack=200")
    elsewhere = iter([True, False, False, True])  # another rank: can it run out? does each trial fit?
    monkeypatch.setattr(memory.distributed, "gather", lambda mine: [mine, next(elsewhere)])
    assert memory.fitting_budget(engine, [rows_of(*[(9, 5, 5)] * 12)], launch) == 50


def test_without_a_budget_a_gpu_tries_the_largest_packs_first(monkeypatch):
    engine, launch = engine_of()
    assert launch.tokens_per_pack is None and memory.scoring_budget(launch) == 8192
    monkeypatch.setattr(memory.distributed, "device", lambda name: torch.device("cuda"))
    tried, resets = [], []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: resets.append((device.type, len(tried))))

    def fits(engine, rows, beside):
        tried.append(sum(map(tokens_of, rows)))
        return tried[-1] <= 16384

    monkeypatch.setattr(memory, "_fits", fits)
    updates = [rows_of(*[(9, 9, 9)] * 2000)]  # 50,000 tokens
    assert memory.fitting_budget(engine, updates, launch) == memory.scoring_budget(launch) == 16384
    assert len(tried) == 2 and 16384 < tried[0] <= 32768
    assert resets == [("cuda", 2)]  # once, after the trial: what training takes is measured from then on
    with monkeypatch.context() as shared:
        shared.setenv(memory.distributed.SHARES, "1")  # the plan counts the memory of 8192
        assert memory.fitting_budget(engine, updates, launch) == memory.scoring_budget(launch) == 8192
    engine.stage = 3  # no trial
    assert memory.fitting_budget(engine, updates, launch) == 8192 and len(tried) == 3
    assert len(resets) == 2


def test_out_of_memory_later_names_the_budget_and_the_step_continues(run, monkeypatch):
    overrides = ["split=all_at_once", "launch.checkpoint_minutes=0", "launch.tokens_per_pack=600"]
    calls, update = [], Plain.update

    def hungry(self, lr):
        calls.append(lr)
        if len(calls) == 4:
            torch.empty(2**50)
        return update(self, lr)

    monkeypatch.setattr(Plain, "update", hungry)
    with pytest.raises(UserError, match=r"memory at update 4: set launch.tokens_per_pack=300, .* checkpoint"):
        run(*overrides)
    assert len(calls) == 4
    assert len(read_lines(run(*overrides), "train")) == len(calls) - 1
