"""What a plan says of memory: worked by hand, refused if it does not fit, and compared with engines that run."""

import gc
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from conftest import compose, needs_bf16, random_model

from sdpo.config import Deepspeed, Optim
from sdpo.errors import UserError
from sdpo.model.engine import open_engine
from sdpo.model.logprobs import Scorer
from sdpo.model.packing import pack
from sdpo.plan import report
from sdpo.run import needs
from sdpo.run.folder import Run
from sdpo.types import TokenPair

BIG = ["model=hub", "model.path=nobody/nothing", "data=lab", "precision=bf16", "launch.memory=80"]


def size(weights, reference=0.0, ranks=8, **changes):
    plain = {"nodes": 1, "precision": "bf16", "save_dtype": "bf16", "adapters": False, "quantized": False}
    plain |= {"offload": False, "states": "fp32", "carries": False, "pair": 2048, "pack": 8192, "recompute": False}
    return needs.Size(weights, reference, ranks, **(plain | changes))


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
        # One GPU: weights 2, masters 4, moments 8 and gradients 4; a moment in 8 bits takes 1 + 4 / 256.
        (size(7.24e9, ranks=1), None, 130.32),
        (size(7.24e9, ranks=1, states="8bit"), None, 87.10625),
        (size(7.24e9, ranks=1, states="host"), None, 43.44),
        (size(8.03e9, ranks=1, states="8bit"), None, 96.6109375),
        (size(8.03e9, ranks=1, adapters=True), None, 17.3448),
    ],
)
def test_memory_of_a_gpu(known, stage, gigabytes):
    assert known.per_gpu(stage) / 1e9 == pytest.approx(gigabytes)


def test_memory_of_a_node_and_disk():
    shared = size(10.7e9, ranks=16, nodes=2)
    assert shared.per_node(2) / 1e9 == pytest.approx(6 * 10.7)  # mapped files are shared; M_t is saved
    assert size(8e9, adapters=True).per_node(None) / 1e9 == pytest.approx(6 * 8)  # its base is mapped, too
    assert size(8e9, ranks=1, states="host").per_node(None) / 1e9 == pytest.approx((12 + 6) * 8)
    assert size(8e9, offload=True, save_dtype="fp32").per_node(2) / 1e9 == pytest.approx((20 + 4) * 8)
    assert (shared.step_on_disk, shared.checkpoint) == (2 * 10.7e9, 36 * 10.7e9)
    assert shared._replace(carries=True).step_on_disk == 10 * 10.7e9  # its moments stay beside it


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        ("0::/system.slice/job_7/step_0\n", "system.slice/job_7/memory.max"),
        ("9:cpu:/a\n5:memory:/slurm/job_7/step_0\n", "memory/slurm/job_7/memory.limit_in_bytes"),
    ],
)
def test_a_job_s_control_group_bounds_the_memory_of_a_machine(tmp_path, monkeypatch, groups, file):
    monkeypatch.setattr(needs, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(needs, "OWN_GROUPS", tmp_path / "own")
    whole = needs.host_memory()
    (tmp_path / "own").write_text(groups)
    bound = tmp_path / "cgroup" / file
    bound.parent.mkdir(parents=True)
    bound.write_text("1000000\n")
    assert needs.host_memory() == 1e6 < whole
    bound.write_text("max\n")
    assert needs.host_memory() == whole


def test_activations_by_hand():
    """3.072e9 weights: (128 / 12 * 3.072e9) ** (1 / 3) is 3200 wide, with 25 layers."""
    known = size(3.072e9)
    assert known.activations(1000, recompute=False) == pytest.approx(42 * 3200 * 25 * 1000 + 2e9)
    assert known.activations(1000, recompute=True) == pytest.approx((2 * 3200 * 25 + 42 * 3200) * 1000 + 2e9)


H200, H100 = 150e9, 85e9  # bytes


@pytest.mark.parametrize(
    ("known", "limit", "host", "states"),
    [
        (size(7.24e9, ranks=1), H200, 137e9, "fp32"),  # 130 GB, and 3 GB of activations
        (size(7.24e9, ranks=1), H100, 140e9, "host"),  # 43 GB, and 18 * 7.24 = 130 GB of the host
        (size(7.24e9, ranks=1), H100, 120e9, "fp32"),  # nothing fits: 87 GB in 8 bits
        (size(8.03e9, ranks=1), H200, 200e9, "host"),  # 145 GB with fp32
        (size(8.03e9, ranks=1), H200, 137e9, "8bit"),
        (size(8.03e9, ranks=1, adapters=True), 80e9, 64e9, "fp32"),
        (size(8.03e9, ranks=8), 80e9, 2e12, "fp32"),  # ranks divide the states with DeepSpeed
    ],
)
def test_auto_takes_the_first_states_that_fit(known, limit, host, states, monkeypatch):
    monkeypatch.setattr(needs, "find_spec", lambda name: True)
    assert needs.chosen_states(known._replace(states="auto"), None, limit, host) == states
    assert needs.chosen_states(known._replace(states="auto"), 2, limit, host) == "fp32"
    assert needs.chosen_states(known._replace(states="8bit"), None, limit, host) == "8bit"


def test_a_run_on_a_gpu_names_what_auto_chose_and_has_it_in_its_keys(toy, monkeypatch, capsys):
    settings = compose("model=local", f"model.path={toy / 'model'}", "data=local", "data.train=[a]", "precision=bf16")
    assert needs.with_states(settings).optim.states == "fp32"  # on a processor
    monkeypatch.setattr(needs.distributed, "device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(needs, "limit", lambda launch: 85e9)
    monkeypatch.setattr(needs, "host_memory", lambda: 140e9)
    assert needs.with_states(settings).optim.states == "fp32" and capsys.readouterr().err == ""
    monkeypatch.setattr(needs.hub, "count_weights", lambda folder: 7.24e9)
    chosen = needs.with_states(settings)
    assert (chosen.optim.states, needs.with_states(chosen)) == ("host", chosen)
    assert capsys.readouterr().err == (
        "optim.states=auto is host here: training needs 133 GB of a GPU of 85 GB with fp32, 46.4 GB with host; "
        "set optim.states=host to have the same on any GPU\n"
    )


def asked(folder, *overrides):
    return [Run(compose("experiment=smoke", *BIG, *overrides), folder / "run", choices={}, arm="big")]


def test_a_run_that_does_not_fit_is_refused_with_what_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "store"))
    with pytest.raises(UserError) as error:
        report.show(asked(tmp_path, "model.parameters=10.7e9", "launch.ranks=8"))
    assert str(error.value) == (
        "big: deepspeed=off needs 195 GB per GPU, of 80 GB, 95% of which can be used; "
        "the cheapest stage that fits is deepspeed=zero2"
    )
    assert "off 193, zero2 49.1, zero3 31.1" in capsys.readouterr().out
    with pytest.raises(UserError, match="needs 195 GB per GPU, .* no stage fits: use more ranks or LoRA"):
        report.show(asked(tmp_path, "model.parameters=10.7e9", "optim.states=fp32"))
    capsys.readouterr()
    report.show(asked(tmp_path, "model.parameters=10.7e9"))
    assert "optim.states=auto is host here: training needs 195 GB of a GPU of 80 GB" in capsys.readouterr().out
    eight, one = (asked(tmp_path, "model.parameters=8e9", f"launch.ranks={n}", "deepspeed=zero2") for n in (8, 4))
    report.show([*eight, one[0]._replace(arm="half")])
    said = capsys.readouterr().out
    assert "\nbig:\n8e+09 weights, 8 ranks" in said and "\nhalf:\n8e+09 weights, 4 ranks" in said
    assert "the pairs are the laboratory's, on which only its own model can be trained" in said
    assert "precision=fp32" not in said
    report.show(asked(tmp_path, "model.parameters=1e9", "precision=fp32"))
    assert "with precision=fp32 a GPU takes several times as long" in capsys.readouterr().out


def used(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def train_a_little(layers, known):
    """The peak of this process in three updates, above what it used before the model was made."""
    stage, precision, offload, states = known
    gc.collect()
    before = used("VmRSS")
    heads = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    model = random_model(intermediate_size=2048, num_hidden_layers=layers, **heads)
    num_weights, scorer = model.num_parameters(), Scorer(model, "sdpa", longest=0)
    settings = Deepspeed(stage=stage, offload=offload)
    engine = open_engine(scorer, Optim(states=states), precision, settings, torch.device("cpu"))
    del model, scorer
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    for _ in range(3):
        for last in (False, True):
            policy = engine.module(pack([TokenPair("a", np.arange(5, 9), np.arange(5, 9), np.arange(5, 8))]))
            engine.backward((policy.rejected - policy.chosen).sum(), last)
        engine.update(1e-4)
    return used("VmHWM") - before, num_weights


def peak(layers, known):
    """The larger peak of two ranks, in bytes, and the number of weights."""
    return max(forked.on_ranks(2, train_a_little, layers, known))


BF16 = [(None, "bf16", False, "fp32"), (None, "bf16", False, "host"), (2, "bf16", False, "fp32")]
BF16 += [(2, "bf16", True, "fp32"), (3, "bf16", False, "fp32"), (3, "bf16", True, "fp32")]
FP32 = [(None, "fp32", False, "fp32"), (1, "fp32", False, "fp32"), (2, "fp32", False, "fp32")]
FP32 += [(3, "fp32", False, "fp32")]


@pytest.mark.slow
@needs_bf16
@pytest.mark.parametrize("known", [*BF16, *FP32], ids=str)
def test_the_formulas_are_what_engines_take(known):
    """The difference of two sizes is free of what a process takes whatever its model; a CPU is its own host."""
    (small, fewer), (large, more) = (peak(layers, known) for layers in (5, 15))
    stage, precision, offload, states = known
    sizes = [size(num, ranks=2, precision=precision, offload=offload, states=states) for num in (fewer, more)]
    before, after = (one.training(stage) + one.on_host(stage) for one in sizes)
    assert large - small == pytest.approx(after - before, rel=0.15)


def test_a_model_of_this_machine_is_planned_on_the_laboratory_s_pairs(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "store"))
    local = ["model=local", f"model.path={toy / 'model'}", "model.sft=null"]
    report.show([Run(compose("experiment=smoke", *local), tmp_path / "run", choices={}, arm="mine")])
    assert "on which only its own model can be trained; data=local names yours" in capsys.readouterr().out
