"""Engines on DeepSpeed are freed when they are closed: live memory is the same after each of four steps."""

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


@pytest.mark.slow
def test_live_memory_is_flat_over_four_steps_at_every_stage():
    paths = os.pathsep.join(map(str, (CHECKOUT, Path(__file__).parents[1])))
    env = os.environ | {"PYTHONPATH": paths, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", FOUR_STEPS], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"stage"')]
    assert [each["stage"] for each in found] == [1, 2, 3]
    for each in found:
        growth = max(each["left"]) - each["left"][0]
        assert growth < 0.01 * each["size"], each
        assert each["left"][-1] < 0.1 * each["size"], each
