"""AdamW's states on the host and in 8 bits: the same updates, or near ones, and the same bytes after a resume."""

import math

import numpy as np
import pytest
import torch
from conftest import compose, random_model, read_lines
from test_faults import Killed, final_bytes, interrupt_after
from torch.utils._python_dispatch import TorchDispatchMode

from sdpo import validate
from sdpo.config import Deepspeed, Optim
from sdpo.errors import UserError
from sdpo.model import parameters
from sdpo.model.engine import Plain, open_engine
from sdpo.model.logprobs import Scorer
from sdpo.model.packing import pack
from sdpo.types import TokenPair

CPU = torch.device("cpu")
BF16 = pytest.param(
    "bf16", marks=pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="no bf16 arithmetic here")
)
EIGHT = pytest.param("8bit", marks=pytest.mark.skipif(not parameters.find_spec("bitsandbytes"), reason="an extra"))


@pytest.mark.slow
@pytest.mark.parametrize("states", ["host", EIGHT])
@pytest.mark.parametrize("precision", ["fp32", BF16])
def test_an_interrupted_step_with_carried_states_continues_to_the_same_bytes(
    run, monkeypatch, tmp_path, states, precision
):
    overrides = [f"optim.states={states}", f"precision={precision}", "optim.moments=carry"]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)  # 3 updates a step
        with pytest.raises(Killed):
            run(*overrides, "launch.checkpoint_minutes=0")
    resumed = run(*overrides, "launch.checkpoint_minutes=0")
    assert [entry["reused"] for entry in read_lines(resumed, "step")] == [True, False, False]
    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "another"))
    whole = run(*overrides, name="whole")
    assert final_bytes(resumed, 3) == final_bytes(whole, 3)
    in_fp32 = run(f"precision={precision}", "optim.states=fp32", "optim.moments=carry", name="fp32")
    assert (final_bytes(whole, 3) == final_bytes(in_fp32, 3)) is (states == "host")  # one processor does both


def losses(states, num_updates=8, lr=1e-3):
    """DPO's loss with beta 1 on one pair before every update, from a reference that is the start."""
    model = random_model(hidden_size=128, intermediate_size=256, head_dim=32)
    engine = open_engine(Scorer(model, "sdpa"), Optim(states=states), "fp32", Deepspeed(), CPU)
    tokens, first, found = np.arange(3, 63, dtype=np.int32), None, []
    for _ in range(num_updates):
        policy = engine.module(pack([TokenPair("a", tokens[:10], tokens[10:35], tokens[35:])]))
        gamma = policy.chosen - policy.rejected
        first = gamma.detach() if first is None else first
        loss = -torch.nn.functional.logsigmoid(gamma - first).sum()
        engine.backward(loss, last=True)
        engine.update(lr)
        found.append(loss.item())
    return found, engine


@pytest.mark.skipif(not parameters.find_spec("bitsandbytes"), reason="an extra")
def test_8_bit_moments_stay_near_those_of_fp32():
    """The first update is AdamW's own, because moments are rounded after it; then they have 7 bits and a scale."""
    (ours, engine), (theirs, _) = losses("8bit"), losses("fp32")
    assert ours[:2] == pytest.approx(theirs[:2], abs=1e-5)
    assert ours[2:] != theirs[2:]
    moved = math.log(2) - theirs[-1]
    assert moved > 0.05 and np.abs(np.subtract(ours, theirs)).max() < 0.05 * moved
    moments = sum(t.nbytes for master in engine.parts for t in parameters.moments_of(engine.optimizer, master).values())
    in_fp32 = 8 * sum(master.numel() for master in engine.parts)
    assert 2 / 8 < moments / in_fp32 < 2.2 / 8  # a byte and 4 / 256 of a scale each, but small tensors are fp32


def test_on_the_host_no_master_has_a_gradient_and_the_device_has_no_master():
    """A GPU would have sums of gradients alone: what stands for masters there takes four bytes."""
    model = random_model()
    size = sum(param.numel() for param in model.parameters())
    engine = open_engine(Scorer(model, "sdpa"), Optim(states="host"), "fp32", Deepspeed(), CPU)
    assert sum(total.untyped_storage().nbytes() for total in engine.sums) == 4 * len(engine.params)
    assert sum(one.numel() for one in parameters.growth(engine.optimizer, engine.sums)) == 3 * size
    engine.backward(
        engine.module(pack([TokenPair("a", *np.arange(3, 33, dtype=np.int32).reshape(3, 10))])).chosen.sum(), True
    )
    engine.update(1e-3)
    assert all(tensor.grad is None for tensor in [*engine.sums, *engine.parts, *engine.params.values()])
    assert sum(one.numel() for one in parameters.growth(engine.optimizer, engine.sums)) == size


class Copies(TorchDispatchMode):
    """Lists the device and dtype of the two ends of every copy between devices."""

    def __init__(self):
        super().__init__()
        self.ends = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten._to_copy):
            ends = [(tensor.device.type, tensor.dtype) for tensor in (args[-1], found)]
            self.ends += [ends] if ends[0][0] != ends[1][0] else []
        return found


def test_masters_on_the_host_are_rounded_on_the_device():
    """A copy that also rounds would round on one thread of the host first. The device here has no memory (meta)."""
    engine = Plain(Scorer(random_model(), "sdpa"), Optim(states="host"), "bf16", CPU)
    engine.params = {name: param.to("meta") for name, param in engine.params.items()}
    with Copies() as copies:
        engine.refresh()
    assert copies.ends == [[("cpu", torch.float32), ("meta", torch.float32)]] * len(engine.params)


@pytest.mark.parametrize("states", ["8bit", "host"])
def test_other_states_are_refused_with_deepspeed(states):
    with pytest.raises(UserError, match=f"optim.states={states} runs without DeepSpeed: use deepspeed=off, or"):
        validate.check(compose("deepspeed=zero2", f"optim.states={states}"))


def test_8_bit_states_need_their_library(monkeypatch):
    monkeypatch.setattr(parameters, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="optim.states=8bit needs bitsandbytes"):
        losses("8bit")
