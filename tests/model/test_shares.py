"""Several ranks: each writes and hashes its share of a model that is not small, at every stage of ZeRO."""

import forked
import pytest
import ranks
import torch
from conftest import byte_tokenizer, compose, random_model
from transformers import AutoModelForCausalLM

from sdpo import config
from sdpo.model import hub, parameters
from sdpo.model.engine import open_engine
from sdpo.model.logprobs import Scorer
from sdpo.store import hashing
from sdpo.store.artifacts import Store
from sdpo.train.runner import Runner


def save(folder):
    """Save a model at every stage: the artifact's folder, the bytes that this rank hashed, and the weights' hash."""
    parameters.SHARE = 2**15
    found, hashed, hash_blocks = [], [], hashing.hash_blocks

    def counted(blocks):
        hashed.append(sum(len(block.content) for block in blocks.values()))
        return hash_blocks(blocks)

    hashing.hash_blocks = counted
    for stage in (None, 1, 2, 3):
        scorer = Scorer(random_model(seed=3), "sdpa")
        engine = open_engine(scorer, config.Optim(), "fp32", config.Deepspeed(stage), torch.device("cpu"))

        def build(out, engine=engine, model=scorer.model):
            share = {name.removeprefix("model."): tensor for name, tensor in engine.share(torch.bfloat16).items()}
            hub.save_shares(model, share, byte_tokenizer(), out)

        hashed.clear()
        artifact = Store(folder / "store").make("step", {"stage": stage}, build)
        content = hub.fingerprint_files(artifact.folder)
        found.append({"stage": stage, "folder": artifact.folder, "hashed": sum(hashed), "content": content})
        engine.close()
    return found


@pytest.mark.slow
def test_every_rank_writes_and_hashes_a_part_of_the_weights_once(tmp_path):
    expected = {name: param.to(torch.bfloat16) for name, param in random_model(seed=3).state_dict().items()}
    size = sum(tensor.nbytes for tensor in expected.values())
    largest = expected["lm_head.weight"].nbytes  # of what one rank writes whole: embeddings, or a layer
    first, second = forked.on_ranks(2, save, tmp_path)
    assert [found["stage"] for found in first] == [None, 1, 2, 3]
    for ours, theirs in zip(first, second, strict=True):
        folder = ours["folder"]
        names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
        assert sorted(path.name for path in folder.glob("model*")) == [*names, "model.safetensors.index.json"]
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())
        assert ours["hashed"] + theirs["hashed"] == size
        assert max(ours["hashed"], theirs["hashed"]) <= size / 2 + largest
        assert ours["content"] == theirs["content"] == hub.fingerprint_weights(expected, torch.bfloat16)


def open_anew():
    """Every step opens an engine of its own."""
    load = Runner.load_to_train
    Runner.load_to_train = lambda self, spec: self.release() or load(self, spec)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_an_engine_that_is_renewed_trains_as_a_new_one(toy, tmp_path, stage):
    """Three steps on DeepSpeed: the engine of step t trains step t + 1 to the bytes of one that is opened for it."""
    files = ",".join(str(toy / f"{source}.jsonl") for source in "abc")
    overrides = ["model=local", f"model.path={toy / 'model'}", "data=local", f"data.train=[{files}]", "evaluate=[]"]
    overrides += ["data.template=plain", "optim.lr=3e-3", "optim.pairs_per_update=8", f"deepspeed={stage}"]
    overrides += ["split=by_source", "+steps.2.optim.lr=1e-3", "+steps.2.optim.clip=0.1", "launch.device=cpu"]
    weights = []
    for name, before in (("kept", None), ("anew", open_anew)):
        folder = tmp_path / name
        ranks.finish(folder, ranks.start(compose(*overrides), folder, tmp_path / f"store-{name}", before))
        weights.append([(folder / "steps" / str(t) / "model.safetensors").read_bytes() for t in (1, 2, 3)])
    assert weights[0] == weights[1]
