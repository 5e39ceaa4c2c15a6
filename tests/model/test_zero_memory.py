"""Engines on DeepSpeed start from the stored weights, and give all their memory back when they are closed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHECKOUT

FOUR_STEPS = """
import gc, json, sys
import torch, torch.distributed as dist
from conftest import random_model
from sdpo import config
from sdpo.model.engine import open_engine
from sdpo.model.logprobs import Scorer, score
from sdpo.model.packing import pack
from sdpo.types import TokenPair
import numpy as np

def live():
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in gc.get_objects() if isinstance(t, torch.Tensor)}
    return sum(storages.values())

tokens = np.arange(3, 43, dtype=np.int32)
pair = TokenPair("a", tokens[:10], tokens[10:25], tokens[25:])
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for stage in (1, 2, 3):
    left = []
    for step in range(4):
        model = random_model(hidden_size=512, intermediate_size=512, vocab_size=1000)
        size = 4 * sum(param.numel() for param in model.parameters())
        scorer, settings = Scorer(model, "sdpa"), config.Deepspeed(stage)
        engine = open_engine(scorer, config.Optim(), "fp32", settings, torch.device("cpu"))
        for update in range(2):
            policy = engine.forward(pack([pair]))
            engine.backward(policy.rejected.sum() - policy.chosen.sum(), last=True)
            engine.update(1e-4)
            score(engine.module, [pair], 8192)
        engine.close()
        del policy, model, scorer
        frozen = Scorer(random_model().requires_grad_(False))
        engine = open_engine(frozen, config.Optim(), "fp32", settings, torch.device("cpu"))
        score(engine.module, [pair], 8192)
        engine.close()
        del frozen
        left.append(live())  # `engine` still names the closed engine
    print(json.dumps({"stage": stage, "size": size, "left": left}))
"""

MASTERS = """
import json, sys
from pathlib import Path
import torch, torch.distributed as dist
from conftest import random_model
from sdpo import config
from sdpo.model import engine, hub
from sdpo.model.logprobs import Scorer

folder = Path(sys.argv[1])
engine.has_bf16 = lambda device: True  # nothing is computed here
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for stored in ("float32", "bfloat16"):
    random_model(seed=3).to(getattr(torch, stored)).save_pretrained(folder / stored)
    expected = {f"model.{name}": param for name, param in hub.load(folder / stored).named_parameters()}
    for stage, precision in ((2, "bf16"), (3, "bf16"), (2, "fp32"), (3, "fp32")):
        scorer = Scorer(hub.load(folder / stored, as_stored=True), "sdpa")
        found = engine.open_engine(scorer, config.Optim(), precision, config.Deepspeed(stage), torch.device("cpu"))
        weights = found.weights()
        same = weights.keys() == expected.keys() and all(map(torch.equal, weights.values(), expected.values()))
        print(json.dumps({"stage": stage, "stored": stored, "precision": precision, "same": same}))
        found.close()
"""


def run_alone(script, *arguments):
    """The JSON lines that a script prints in a process that is the only rank of a process group."""
    paths = os.pathsep.join(map(str, (CHECKOUT, Path(__file__).parents[1])))
    env = os.environ | {"PYTHONPATH": paths, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", script, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"stage"')]


@pytest.mark.slow
def test_masters_are_the_stored_weights_bit_for_bit(tmp_path):
    found = run_alone(MASTERS, str(tmp_path))
    assert len(found) == 8 and [each for each in found if not each["same"]] == []


@pytest.mark.slow
def test_live_memory_is_flat_over_four_steps_at_every_stage():
    found = run_alone(FOUR_STEPS)
    assert [each["stage"] for each in found] == [1, 2, 3]
    for each in found:
        growth = max(each["left"]) - each["left"][0]
        assert growth < 0.01 * each["size"], each
        assert each["left"][-1] < 0.1 * each["size"], each
