"""Host memory of four ranks at zero3, while a random model of 300M weights is loaded to train and while it is saved.

P is the size of the model's weights in bf16. PSS counts a page that several processes share once.
"""

import gc
import json
import time
from functools import partial
from pathlib import Path

import pytest
import ranks
import torch
from conftest import byte_tokenizer, compose, random_model

from sdpo.model.engine import has_bf16
from sdpo.train.runner import Runner

SHAPE = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 21}
SHAPE |= {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64, "tie_word_embeddings": True}
PHASES = ("load_to_train", "save")


def note_phases(log):
    """In a rank: add a line to `log` as each phase begins and ends, with the time and the bytes of live tensors."""

    def note(event):
        with log.open("a") as file:
            file.write(json.dumps({"event": event, "time": time.time(), "live": live()}) + "\n")

    def noted(name):
        method = getattr(Runner, name)

        def wrapper(*arguments):
            note(f"{name} begins")
            result = method(*arguments)
            note(f"{name} ends")
            return result

        return wrapper

    for name in PHASES:
        setattr(Runner, name, noted(name))


def live():
    tensors = (each for each in gc.get_objects() if isinstance(each, torch.Tensor))
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


def pss(process):
    """The bytes of a process's memory, its share of what it shares; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    except (FileNotFoundError, ProcessLookupError, StopIteration):
        return 0


@pytest.fixture(scope="module")
def model(toy, tmp_path_factory):
    """The folder of the model, stored in bf16, and P in bytes."""
    folder = tmp_path_factory.mktemp("large")
    made = random_model(**SHAPE).to(torch.bfloat16)
    made.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder, 2 * sum(param.numel() for param in made.parameters())


@pytest.mark.slow
@pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="this processor has no bf16 arithmetic")
def test_loading_and_saving_take_little_host_memory_beside_the_live_tensors(toy, model, tmp_path):
    path, P = model
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join((toy / "a.jsonl").read_text().splitlines()[:4]))  # a pair for each rank
    overrides = ["model=local", f"model.path={path}", "data=local", f"data.train=[{pairs}]"]
    overrides += ["data.template=plain", "split=all_at_once", "evaluate=[]", "optim.pairs_per_update=4"]
    overrides += ["launch.ranks=4", "launch.device=cpu", "deepspeed=zero3", "precision=bf16", "save_dtype=bf16"]
    log = tmp_path / "phases.txt"
    processes = ranks.start(compose(*overrides), tmp_path / "run", tmp_path / "store", partial(note_phases, log))
    samples = []
    while any(process.is_alive() for process in processes):
        samples.append((time.time(), sum(map(pss, processes))))
        time.sleep(0.01)
    ranks.finish(tmp_path / "run", processes)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    at = {name: [event for event in events if event["event"] == name] for name in {event["event"] for event in events}}
    held = sum(event["live"] for event in at["load_to_train ends"])
    print(f"\n{P / 2e6:.0f}M weights, P = {P / 1e6:.0f} MB, live after load {held / P:.2f} P")
    beside = {}
    for phase in PHASES:
        begin, end = (max(event["time"] for event in at[f"{phase} {when}"]) for when in ("begins", "ends"))
        first = min(event["time"] for event in at[f"{phase} begins"])
        before = max(size for when, size in samples if when <= begin)
        inside = max(size for when, size in samples if first <= when <= end)
        lived = sum(event["live"] for event in at[f"{phase} begins"])
        beside[phase] = inside
        print(f"{phase}: before {before / P:.2f} P ({lived / P:.2f} P live), peak {inside / P:.2f} P")
