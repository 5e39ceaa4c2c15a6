"""Several ranks: each writes and hashes its share of a model that is not small, at every stage of ZeRO."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CHECKOUT, random_model
from transformers import AutoModelForCausalLM

from sdpo.model import hub

SAVE = """
import json, sys
from pathlib import Path
import torch, torch.distributed as dist
from conftest import byte_tokenizer, random_model
from sdpo import config, distributed
from sdpo.model import hub, parameters
from sdpo.model.engine import open_engine
from sdpo.model.logprobs import Scorer
from sdpo.store import hashing
from sdpo.store.artifacts import Store

parameters.SHARE = 2**15
hashed, hash_blocks = [], hashing.hash_blocks

def counted(blocks):
    hashed.append(sum(len(block.content) for block in blocks.values()))
    return hash_blocks(blocks)

hashing.hash_blocks = counted
folder = Path(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=distributed.rank(), world_size=2)
for stage in (None, 1, 2, 3):
    scorer = Scorer(random_model(seed=3), "sdpa")
    engine = open_engine(scorer, config.Optim(), "fp32", config.Deepspeed(stage), torch.device("cpu"))

    def build(out):
        share = {name.removeprefix("model."): tensor for name, tensor in engine.share(torch.bfloat16).items()}
        hub.save_shares(scorer.model, share, byte_tokenizer(), out)

    hashed.clear()
    artifact = Store(folder / "store").make("step", {"stage": stage}, build)
    content = hub.fingerprint_files(artifact.folder)
    print(json.dumps({"stage": stage, "folder": str(artifact.folder), "hashed": sum(hashed), "content": content}))
    engine.close()
"""


def save_on_two_ranks(folder):
    """What the script prints, rank by rank."""
    paths = os.pathsep.join(map(str, (CHECKOUT, Path(__file__).parents[1])))
    env = os.environ | {"PYTHONPATH": paths, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", SAVE, str(folder)]
    ranks = [
        subprocess.Popen(
            command, env=env | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    return [[json.loads(line) for line in out.splitlines() if line.startswith('{"stage"')] for out, _ in said]


@pytest.mark.slow
def test_every_rank_writes_and_hashes_a_part_of_the_weights_once(tmp_path):
    expected = {name: param.to(torch.bfloat16) for name, param in random_model(seed=3).state_dict().items()}
    size = sum(tensor.nbytes for tensor in expected.values())
    largest = expected["lm_head.weight"].nbytes  # of what one rank writes whole: embeddings, or a layer
    first, second = save_on_two_ranks(tmp_path)
    assert [found["stage"] for found in first] == [None, 1, 2, 3]
    for ours, theirs in zip(first, second, strict=True):
        folder = Path(ours["folder"])
        names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
        assert sorted(path.name for path in folder.glob("model*")) == [*names, "model.safetensors.index.json"]
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())
        assert ours["hashed"] + theirs["hashed"] == size
        assert max(ours["hashed"], theirs["hashed"]) <= size / 2 + largest
        assert ours["content"] == theirs["content"] == hub.fingerprint_weights(expected, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_an_engine_that_is_renewed_trains_as_a_new_one(toy, tmp_path, stage):
    """Three steps on DeepSpeed: the engine of step t trains step t + 1 to the bytes of one that is opened for it."""
    script = (
        "import sys; from conftest import *; from sdpo import stepwise; from sdpo.run import folder as run_folder\n"
        "from sdpo.train.runner import Runner; from pathlib import Path; import torch.distributed as dist\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "load = Runner.load_to_train\n"
        "if sys.argv[1] == 'anew': Runner.load_to_train = lambda self, spec: self.release() or load(self, spec)\n"
        "settings, folder = compose(*sys.argv[3:]), Path(sys.argv[2])\n"
        "run_folder.Run(settings, folder, choices={}, arm='a').prepare(); stepwise.run(settings, folder)"
    )
    paths = os.pathsep.join(map(str, (CHECKOUT, Path(__file__).parents[1])))
    env = os.environ | {"PYTHONPATH": paths, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    files = ",".join(str(toy / f"{source}.jsonl") for source in "abc")
    overrides = ["model=local", f"model.path={toy / 'model'}", "data=local", f"data.train=[{files}]", "evaluate=[]"]
    overrides += ["data.template=plain", "optim.lr=3e-3", "optim.pairs_per_update=8", f"deepspeed={stage}"]
    overrides += ["split=by_source", "+steps.2.optim.lr=1e-3", "+steps.2.optim.clip=0.1", "launch.device=cpu"]
    weights = []
    for name in ("kept", "anew"):
        command = [sys.executable, "-c", script, name, str(tmp_path / name), *overrides]
        own = env | {"SDPO_STORE": str(tmp_path / f"store-{name}")}
        done = subprocess.run(command, env=own, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        weights.append([(tmp_path / name / "steps" / str(t) / "model.safetensors").read_bytes() for t in (1, 2, 3)])
    assert weights[0] == weights[1]
