"""What only a GPU shows: `make test-gpu` runs these tests, and all others with the marker, in three minutes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CHECKOUT, random_model, read_lines

from sdpo.model import head, layers
from sdpo.model.logprobs import Scorer, exceeds_rounding, naive_logprobs
from sdpo.model.packing import pack
from sdpo.types import TokenPair

pytestmark = pytest.mark.gpu
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

STAGES = """
import json, numpy as np, torch, torch.distributed as dist
from conftest import random_model
from sdpo import config
from sdpo.model.engine import open_engine
from sdpo.model.logprobs import Scorer
from sdpo.model.packing import pack
from sdpo.types import TokenPair

tokens, cuda = np.arange(3, 103, dtype=np.int32), torch.device("cuda", 0)
torch.cuda.set_device(cuda)
dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=cuda)
rows = [TokenPair(str(n), tokens[n : n + 10], tokens[n + 10 : n + 25], tokens[n + 25 : n + 45]) for n in range(8)]
for precision in ("fp32", "bf16"):
    for stage in (None, 2, 3):
        scorer = Scorer(random_model())
        engine = open_engine(scorer, config.Optim(lr=1e-3), precision, config.Deepspeed(stage), cuda)
        values = []
        for update in range(3):
            policy = engine.module(pack(rows).to(cuda))
            loss = torch.nn.functional.softplus((policy.rejected - policy.chosen) / 10).mean()
            values.append(loss.item())
            engine.backward(loss, last=True)
            engine.update(1e-3)
        print(json.dumps({"stage": stage, "precision": precision, "losses": values}))
        engine.close()
dist.destroy_process_group()
"""


def rows_of(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [
        TokenPair(str(i), *(torch.randint(3, 300, (n,), generator=generator).int().numpy() for n in three))
        for i, three in enumerate(lengths)
    ]


ROWS = rows_of((1, 1, 1), (5, 9, 3), (12, 1, 30), (70, 65, 33), (4, 3, 0))


def logps(scorer, rows):
    return torch.stack(scorer(pack(rows).to("cuda")), 1)


def relative_error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("has_bias", [False, True])
def test_products_of_the_head_are_summed_in_fp32(has_bias, monkeypatch):
    """1024 rows, 256 hidden, 1000 tokens, in bf16: against fp64, and with logits kept or recomputed."""
    model = random_model("phi" if has_bias else "llama", hidden_size=256, vocab_size=1000).to("cuda", torch.bfloat16)
    project = head.Head(model)
    torch.manual_seed(0)
    with torch.no_grad():
        project.weight.normal_()
    hidden_RH = torch.randn(1024, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets_R, slope_R = torch.randint(0, 1000, (1024,), device="cuda"), torch.randn(1024, device="cuda")
    inputs = [hidden_RH, project.weight, *([project.bias] if has_bias else [])]
    monkeypatch.setitem(head.TILE_BYTES, "cuda", 4 * 1000 * 300)
    found = []
    for room in (0, 2**40):  # recomputed, kept
        monkeypatch.setattr(head, "_room_for_logits", lambda _weight, room=room: room)
        logps_R = project(hidden_RH, targets_R)
        found.append([logps_R, *torch.autograd.grad((logps_R * slope_R).sum(), inputs)])
    assert all(map(torch.equal, *found))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    logits_RV = torch.nn.functional.linear(*exact)
    expected_R = logits_RV.log_softmax(-1).gather(1, targets_R[:, None])[:, 0]
    # Each sum of 256 products, and the sums of the softmax, round as often as they have terms.
    size = (hidden_RH.detach().double().abs() @ project.weight.detach().double().abs().T).max()
    assert (found[0][0] - expected_R).abs().max() <= 2 * (256 + 32) * 2.0**-24 * size
    expected = torch.autograd.grad((expected_R * slope_R).sum(), exact)
    for ours, theirs in zip(found[0][1:], expected, strict=True):
        assert relative_error(ours, theirs) < 2.0**-7  # the slopes, and each gradient, are rounded to bf16


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2"])
@pytest.mark.filterwarnings("ignore:.*RoPE")
def test_fused_kernels_equal_an_unchanged_model(architecture, precision):
    pytest.importorskip("liger_kernel")
    changed, unchanged = (
        random_model(architecture, head_dim=16, sliding_window=8).to("cuda", DTYPES[precision]) for _ in range(2)
    )
    scorer = Scorer(changed)
    assert layers.fuse(changed)
    found_B2 = logps(scorer, ROWS)
    expected_B2 = torch.stack([torch.stack(naive_logprobs(unchanged, row)) for row in ROWS])
    numbers = (x.detach().cpu().numpy() for x in (found_B2, expected_B2))
    assert not exceeds_rounding(*numbers, ROWS, DTYPES[precision])
    found, expected = (
        torch.autograd.grad(x.sum(), list(model.parameters()))
        for x, model in ((found_B2, changed), (expected_B2, unchanged))
    )
    total = sum(float(x.double().norm() ** 2) for x in expected) ** 0.5
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours.double() - theirs.double()).norm()) <= (1e-4 if precision == "fp32" else 5e-2) * total


@pytest.mark.filterwarnings("ignore:::torch")  # the compiler's own warnings
def test_compiled_layers_equal_the_naive_forward_pass_at_all_lengths():
    from torch._dynamo.utils import counters

    model = random_model(head_dim=16).to("cuda", torch.bfloat16)
    scorer = Scorer(model)
    layers.compile_layers(model)
    num_first = 0
    for rows in (ROWS, ROWS[:2], ROWS[3:], rows_of((20, 5, 5)), rows_of((300, 100, 90))):
        found_B2 = logps(scorer, rows)
        found_B2.sum().backward()
        num_first = num_first or counters["stats"]["unique_graphs"]
        assert counters["stats"]["unique_graphs"] == num_first
        expected_B2 = torch.stack([torch.stack(naive_logprobs(model, row)) for row in rows])
        numbers = (x.detach().cpu().numpy() for x in (found_B2, expected_B2))
        assert not exceeds_rounding(*numbers, rows, torch.bfloat16)


@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize("precision", DTYPES)
def test_three_steps_start_at_the_loss_of_zero_margins(run, precision, tune):
    folder = run("split=by_source", "launch.device=cuda", f"precision={precision}", f"tune={tune}")
    entries = read_lines(folder, "train")
    first = [entry["loss"] for entry in entries if entry["update"] == 1]
    # Rounding of a pair's margin by m changes its loss by at most beta / 2 * m, which is 0.05 m.
    assert first == pytest.approx([math.log(2)] * 3, abs=1e-6 if precision == "fp32" else 0.01)
    assert all(math.isfinite(entry["loss"]) for entry in entries) and len(entries) > len(first)


def test_zero_2_and_3_on_nccl_take_the_updates_of_plain_pytorch():
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(CHECKOUT), str(Path(__file__).parent), *sys.path])}
    env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    done = subprocess.run([sys.executable, "-c", STAGES], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"stage"')]
    assert [each["stage"] for each in found] == [None, 2, 3] * 2
    for plain, *others in (found[:3], found[3:]):
        assert plain["losses"][2] < plain["losses"][0]
        tolerance = 1e-5 if plain["precision"] == "fp32" else 1e-2
        for other in others:
            assert other["losses"] == pytest.approx(plain["losses"], rel=tolerance), other


def test_runs_of_a_sweep_are_forked_and_share_the_gpu(toy, tmp_path):
    """The process that forks them must not have started CUDA."""
    settings = ["model=local", f"model.path={toy / 'model'}", "data=local", f"data.train=[{toy / 'a.jsonl'}]"]
    settings += ["data.template=plain", "split=all_at_once", "precision=bf16", "launch.device=cuda", "seed=0,1"]
    command = [sys.executable, str(CHECKOUT / "train.py"), "-m", *settings, f"hydra.sweep.dir={tmp_path / 'out'}"]
    env = os.environ | {"SDPO_STORE": str(tmp_path / "store")}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "out").glob("*/done"))) == 2
