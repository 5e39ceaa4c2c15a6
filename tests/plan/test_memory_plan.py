"""What a plan says of memory: worked by hand, refused if it does not fit, and compared with engines that run."""

import gc
import multiprocessing
import os
import socket
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import compose, random_model

from sdpo.config import Deepspeed, Optim
from sdpo.errors import UserError
from sdpo.model.engine import has_bf16, open_engine
from sdpo.model.logprobs import Scorer
from sdpo.model.packing import pack
from sdpo.plan import memory, report
from sdpo.run.folder import Run
from sdpo.types import TokenPair

BIG = ["model=hub", "model.path=nobody/nothing", "data=lab", "precision=bf16", "launch.memory=80"]


def size(weights, reference=0.0, ranks=8, **changes):
    plain = {"nodes": 1, "precision": "bf16", "save_dtype": "bf16", "adapters": False, "quantized": False}
    return memory.Size(weights, reference, ranks, **(plain | {"offload": False} | changes))


@pytest.mark.parametrize(
    ("known", "stage", "gigabytes"),
    [
        # The paper's run, 10.7B weights on 8 GPUs.
        (size(10.7e9), None, 18 * 10.7),
        (size(10.7e9), 2, 2 * 10.7 + 20 * 10.7 / 8 + 1),
        (size(10.7e9), 3, 18 * 10.7 / 8 + 7),
        (size(10.7e9, precision="fp32"), None, 16 * 10.7),
        # A reference of 70B scores: whole on every GPU, and divided under ZeRO-3.
        (size(7e9, 70e9), 2, 2 * 70),
        (size(7e9, 70e9), 3, max(18 * 7 / 8 + 7, 2 * 70 / 8 + 3)),
        # Adapters of 1 %.
        (size(7e9, adapters=True), None, 2 * 7 + 16 * 0.07),
        (size(7e9, adapters=True, quantized=True), None, 0.55 * 7 + 16 * 0.07),
        (size(70e9, offload=True), 3, 7),
    ],
)
def test_memory_of_a_gpu(known, stage, gigabytes):
    assert known.per_gpu(stage) / 1e9 == pytest.approx(gigabytes)


def test_memory_of_a_node_and_disk():
    shared = size(10.7e9, ranks=16, nodes=2)
    assert shared.per_node(2) / 1e9 == pytest.approx(8 * 8 * 10.7)  # every rank loads the weights twice in fp32
    assert (shared.step_on_disk, shared.checkpoint) == (2 * 10.7e9, 24 * 10.7e9)


def asked(folder, *overrides):
    return [Run(compose("experiment=smoke", *BIG, *overrides), folder / "run", choices={}, arm="big")]


def test_a_run_that_does_not_fit_is_refused_with_what_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "store"))
    with pytest.raises(UserError) as error:
        report.show(asked(tmp_path, "model.parameters=10.7e9", "launch.ranks=8"))
    assert str(error.value) == (
        "big: deepspeed=off needs 193 GB per GPU, of 80 GB; the cheapest stage that fits is deepspeed=zero2"
    )
    assert "off 193, zero2 49.1, zero3 31.1" in capsys.readouterr().out
    with pytest.raises(UserError, match="needs 193 GB per GPU, of 80 GB; no stage fits: use more ranks or LoRA"):
        report.show(asked(tmp_path, "model.parameters=10.7e9"))
    report.show(asked(tmp_path, "model.parameters=8e9", "launch.ranks=8", "deepspeed=zero2"))


def used(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def train_a_little(rank, world, stage, layers, results):
    """The peak of this process in three updates, above what it used before the model was made."""
    os.environ |= {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group("gloo")
    warnings.simplefilter("ignore")  # those of DeepSpeed
    if stage:
        import deepspeed  # noqa: F401  before the measurement
    gc.collect()
    before = used("VmRSS")
    heads = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    model = random_model(intermediate_size=2048, num_hidden_layers=layers, **heads)
    num_weights, scorer = model.num_parameters(), Scorer(model, "sdpa", longest=0)
    engine = open_engine(scorer, Optim(), "bf16", Deepspeed(stage=stage), torch.device("cpu"))
    del model, scorer
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    for _ in range(3):
        policy = engine.forward(pack([TokenPair("a", np.arange(5, 9), np.arange(5, 9), np.arange(5, 8))]))
        engine.backward((policy.rejected - policy.chosen).sum(), last=True)
        engine.update(1e-4)
    results.put((used("VmHWM") - before, num_weights))


def peak(stage, layers):
    """The larger peak of two ranks, in bytes, and the number of weights."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    ranks = [fork.Process(target=train_a_little, args=(rank, world, stage, layers, results)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    found = [results.get(timeout=120) for _ in ranks]
    for rank in ranks:
        rank.join()
    return max(found)


@pytest.mark.slow
@pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="this processor has no bf16")
@pytest.mark.parametrize("stage", [None, 2, 3])
def test_the_formulas_are_what_engines_take(stage):
    """The difference of two sizes is free of what a process takes whatever its model."""
    (small, fewer), (large, more) = (peak(stage, layers) for layers in (5, 15))
    expected = size(more, ranks=2).training(stage) - size(fewer, ranks=2).training(stage)
    assert large - small == pytest.approx(expected, rel=0.15)
