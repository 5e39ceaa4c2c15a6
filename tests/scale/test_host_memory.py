"""Host memory of four ranks at zero3 while a random model of 300M weights is loaded to train, and while it is saved.

P is the size of its weights in bf16. Memory is the ranks' PSS: a page that several share counts once.
"""

import gc
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from conftest import byte_tokenizer, compose, random_model

from sdpo import distributed, stepwise
from sdpo.model import engine
from sdpo.store.artifacts import Store
from sdpo.train import setup
from sdpo.train.runner import Runner
from sdpo.train.step_key import StepSpec

SHAPE = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 21}
SHAPE |= {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64, "tie_word_embeddings": True}
REST = 1.0  # seconds between two phases, in which nothing is computed


def only_load_and_save(log):
    """In a rank: let a run only load the first step's engine and save it. `log` gets the times of the phases."""
    stepwise.run = partial(load_and_save, log)
    Runner._check = lambda *_: None  # it would run the model
    engine.has_bf16 = lambda device: True  # nothing is computed


def load_and_save(log, config, folder):
    inputs = setup.prepare(config, Store())
    chunk = inputs.chunk(np.arange(len(inputs.train.rows)))
    spec = StepSpec(1, config, inputs.initial, [inputs.initial], chunk)
    note(log, "begun")
    opened = inputs.runner.load_to_train(spec)
    note(log, "loaded")
    (folder / "saved").mkdir(exist_ok=True)
    inputs.runner.save(opened, folder / "saved", "a key")
    note(log, "saved")


def note(log, event):
    """Rest, and write down when the rest began and ended and how many bytes of tensors the ranks hold."""
    distributed.barrier()
    gc.collect()
    began, tensors = time.time(), (each for each in gc.get_objects() if isinstance(each, torch.Tensor))
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    live = sum(distributed.gather(sum(storages.values())))
    time.sleep(REST)
    distributed.barrier()
    if distributed.is_main():
        with log.open("a") as file:
            file.write(json.dumps({"event": event, "from": began, "to": time.time(), "live": live}) + "\n")


def pss(process):
    """The bytes of a process's memory; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of the model, stored in bf16, and P in bytes."""
    folder = tmp_path_factory.mktemp("large")
    made = random_model(**SHAPE).to(torch.bfloat16)
    made.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder, 2 * sum(param.numel() for param in made.parameters())


@pytest.mark.slow
def test_loading_and_saving_take_little_host_memory_beside_the_engine(toy, model, tmp_path):
    path, size = model
    overrides = ["model=local", f"model.path={path}", "data=local", f"data.train=[{toy / 'a.jsonl'}]"]
    overrides += ["data.template=plain", "launch.ranks=4", "launch.device=cpu", "deepspeed=zero3"]
    overrides += ["precision=bf16", "save_dtype=bf16"]
    log, samples = tmp_path / "phases.txt", []
    before = partial(only_load_and_save, log)
    processes = ranks.start(compose(*overrides), tmp_path / "run", tmp_path / "store", before)
    while any(process.is_alive() for process in processes):
        samples.append((time.time(), sum(map(pss, processes)) / size))
        time.sleep(0.01)
    ranks.finish(tmp_path / "run", processes)
    begun, loaded, saved = map(json.loads, log.read_text().splitlines())

    def most(begin, end):
        return max(memory for when, memory in samples if begin <= when <= end)

    rest = {event["event"]: most(event["from"], event["to"]) for event in (begun, loaded, saved)}
    load, save = most(begun["to"], loaded["from"]), most(loaded["to"], saved["from"])
    print(f"\n{size / 2e6:.0f}M weights, P = {size / 1e6:.0f} MB; in units of P:")
    print("at rest: " + ", ".join(f"{event} {memory:.2f}" for event, memory in rest.items()))
    live = {event["event"]: event["live"] / size for event in (begun, loaded, saved)}
    print("live tensors: " + ", ".join(f"{event} {memory:.2f}" for event, memory in live.items()))
    print(f"peaks: loading {load:.2f}, saving {save:.2f}")
    assert load - rest["begun"] <= live["loaded"] + 1.5  # live: with DeepSpeed's buckets, which are empty by then
    assert save - live["loaded"] <= 1.5
    assert save - rest["loaded"] <= 2.5  # all shares in save_dtype (1 P), once more in the files' pages, and what moves
