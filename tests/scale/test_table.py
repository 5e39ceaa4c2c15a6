"""Ranks x ZeRO stages x tuned weights x references: the losses of one plain rank, and equal bytes when done again.

`make test-scale` runs the whole table. Otherwise a covering part of it runs, in which every pair of values is together
at least once.
"""

import os
import time
from itertools import combinations, product

import numpy as np
import pytest
import ranks
from conftest import byte_tokenizer, compose, random_model, read_lines

AXES = {
    "ranks": (1, 2, 4),
    "stage": ("off", "zero1", "zero2", "zero3", "zero2 offload", "zero3 offload"),
    "tune": ("full", "lora"),
    "reference": ("previous", "mixed", "external"),
}
NUM_STEPS = 2


def pairs_of(cell):
    return set(combinations(enumerate(cell), 2))


def covering(cells):
    """Some of the cells that contain every pair of values: each time the first cell with the most new pairs."""
    missing, chosen = set().union(*map(pairs_of, cells)), []
    while missing:
        chosen.append(max(cells, key=lambda cell: len(pairs_of(cell) & missing)))
        missing -= pairs_of(chosen[-1])
    return chosen


WHOLE = list(product(*AXES.values()))
CELLS = WHOLE if os.environ.get("TABLE") == "whole" else covering(WHOLE)


def test_the_covering_part_has_every_pair_of_values():
    part = covering(WHOLE)
    assert len(WHOLE) == 108 and 18 <= len(part) <= 24  # ranks x stages are 18 pairs
    assert set().union(*map(pairs_of, part)) == set().union(*map(pairs_of, WHOLE))


@pytest.fixture(scope="module")
def train(toy, tmp_path_factory):
    """train(cell) trains the cell's two steps in a new store; returns the run folder."""
    another = tmp_path_factory.mktemp("external")
    random_model(seed=1).save_pretrained(another)
    byte_tokenizer().save_pretrained(another)
    base = ["model=local", f"model.path={toy / 'model'}", "data=local", "data.template=plain", "evaluate=[]"]
    base += [f"data.train=[{toy / 'a.jsonl'},{toy / 'b.jsonl'}]", "launch.device=cpu"]
    base += ["optim.lr=3e-3", "optim.pairs_per_update=8"]
    references = {"previous": [], "mixed": ["reference.updates=2", "reference.alpha=0.6"]}
    references["external"] = [f"reference.path={another}", "reference.template=plain"]

    def run(cell):
        num_ranks, stage, tune, reference = cell
        overrides = [f"launch.ranks={num_ranks}", f"tune={tune}", f"reference={reference}", *references[reference]]
        overrides += [f"deepspeed={stage.split()[0]}", f"deepspeed.offload={str('offload' in stage).lower()}"]
        place = tmp_path_factory.mktemp("cell")
        ranks.finish(place / "run", ranks.start(compose(*base, *overrides), place / "run", place / "store"))
        return place / "run"

    return run


@pytest.fixture(scope="module")
def plain(train):
    """plain(tune, reference): the losses on one rank without DeepSpeed."""
    known = {}

    def losses(*choice):
        if choice not in known:
            known[choice] = losses_of(train((1, "off", *choice)))
        return known[choice]

    return losses


@pytest.fixture(scope="module")
def show():
    """show(cell, worst, is_same, seconds) prints a row of the table, below its header."""
    print("\nloss: largest difference from one rank at stage off; again: the models of a second run")
    print(f"{'ranks':6}{'stage':15}{'tune':6}{'reference':11}{'loss':>9}  {'again':12}{'seconds':>7}")

    def row(cell, worst, is_same, seconds):
        num_ranks, stage, tune, reference = cell
        again = "same bytes" if is_same else "OTHER BYTES"
        print(f"{num_ranks:<6}{stage:15}{tune:6}{reference:11}{worst:9.1e}  {again:12}{seconds:7.1f}")

    return row


def losses_of(folder):
    return [entry["loss"] for entry in read_lines(folder, "train")]


def models(folder):
    return [(folder / "steps" / str(t) / "model.safetensors").read_bytes() for t in range(1, NUM_STEPS + 1)]


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(map(str, cell)).replace(" ", "_"))
def test_a_cell_has_the_losses_of_one_plain_rank_and_the_same_bytes_when_done_again(cell, train, plain, show):
    expected, began = plain(*cell[2:]), time.monotonic()
    first, again = train(cell), train(cell)
    worst, is_same = np.abs(np.subtract(losses_of(first), expected)).max(), models(first) == models(again)
    show(cell, worst, is_same, time.monotonic() - began)
    assert len(expected) == 6 and np.ptp(expected) > 0.01  # it learns: far more than the tolerance
    assert worst < 1e-4 and is_same
