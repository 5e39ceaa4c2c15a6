"""What a GPU would allocate and build, on machines without one: see hollow.py."""

import json

import pytest
from hollow import A100, H200, RTX_4090, RTX_5090, build, needs_cuda_build, run_on

pytestmark = [pytest.mark.slow, needs_cuda_build]

TRAINING = """
import json, sys, torch
torch.backends.cuda.enable_cudnn_sdp(False)  # there is no stand-in for cuDNN
from sdpo.model import logprobs
logprobs.check_packing = lambda *_: None  # kernels compute nothing
from analysis.benchmark.ours import configure, open_side, take_update
from analysis.benchmark.work import Work, from_profile, prepare
from sdpo.model.logprobs import score
from sdpo.model.memory import fitting_budget, scoring_budget
from sdpo.run.needs import Size, chosen_states, limit

folder, shape, tune, packs = sys.argv[1:]
work = Work(folder, shape, 64, "bf16", "cuda", [1], [int(packs) or None], [False], tune == "lora")
prepare(work, from_profile("ultrafeedback", 64))
config, rows = configure(work), work.rows()
with torch.device("meta"):
    num_weights = sum(p.numel() for p in work._replace(device="meta").build().parameters())
config.optim.states = "auto"
config.optim.states = chosen_states(Size.of(config, num_weights, 0), None, limit(config.launch))
engine = open_side(work, config)
updates = [rows, rows]
score(engine.scorer, rows, int(packs) or scoring_budget(config.launch))
budget = int(packs) or fitting_budget(engine, updates, config.launch)
for update in updates:
    take_update(engine, update, budget)
found = {"states": config.optim.states, "budget": budget, "peak": torch.cuda.max_memory_allocated() / 2**30}
print(json.dumps(found))
"""

KERNELS = """
import sys, numpy as np, torch
from sdpo.model.attention.cuda import Flex
from sdpo.model.attention.sdpa import Rule
from sdpo.model.packing import pack
from sdpo.types import TokenPair

key, value, dtype = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])
three = (np.full(n, 7, np.int32) for n in (400, 30, 20))
packed = pack([TokenPair("", *three)]).to("cuda")
sizes = {"query": (4, key), "key": (2, key), "value": (2, value)}
made = {"device": "cuda", "dtype": dtype, "requires_grad": True}
query, key, value = (torch.empty(len(packed.tokens_T), *size, **made) for size in sizes.values())
rule = Rule(None, 128, 50.0, torch.zeros(4, device="cuda"), 0.0)
Flex(packed)(query, key, value, rule).sum().backward()
print(query.grad.shape == query.shape)
"""


@pytest.fixture(scope="module")
def hollow(tmp_path_factory):
    return build(tmp_path_factory.mktemp("hollow"))


@pytest.mark.parametrize(("shape", "tune", "measured"), [("1b", "full", 59.4), ("7b", "lora", 107.4)])
def test_the_peak_is_that_of_a_real_h200(hollow, tmp_path, shape, tune, measured):
    """In GiB, with packs of 32k and PyTorch 2.11 (LOG.md, 2026-11-27): so a hollow GPU allocates what a card does."""
    found = json.loads(run_on(H200, hollow, TRAINING, str(tmp_path / "work"), shape, tune, "32768"))
    assert found["peak"] == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(
    ("card", "shape", "tune", "states"),
    [
        (H200, "7b", "full", "fp32"),
        (A100, "7b", "lora", "fp32"),
        (A100, "8b", "lora", "fp32"),
        (A100, "3b", "full", "fp32"),
        (RTX_4090, "7b", "lora", "fp32"),
    ],
)
def test_what_fits_in_the_trial_fits_in_training(hollow, tmp_path, card, shape, tune, states):
    """Without a setting by hand: optim.states=auto, and packs as large as the trial finds."""
    found = json.loads(run_on(card, hollow, TRAINING, str(tmp_path / "work"), shape, tune, "0"))
    assert found["states"] == states
    assert found["peak"] * 2**30 <= card.memory


SIZES = [(64, 64, "bfloat16"), (192, 128, "bfloat16"), (128, 128, "float32"), (256, 256, "bfloat16")]  # key, value


@pytest.mark.parametrize(
    ("card", "size"),
    [*((RTX_4090, size) for size in SIZES), *((card, SIZES[-1]) for card in (A100, H200, RTX_5090))],
)
def test_flex_attention_can_be_built(hollow, card, size):
    """With windows, soft caps and sinks at once, forward and backward; the largest heads on every card."""
    assert run_on(card, hollow, KERNELS, *map(str, size)) == "True\n"
