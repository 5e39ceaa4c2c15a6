"""A new split, reference rule, loss and score each take one function and one file; nothing else is edited."""

import json
import shutil
from pathlib import Path

import conftest
import pytest
from conftest import read_lines
from torch.nn.functional import softplus

from sdpo.types import Window
from sdpo.variants import loss as losses
from sdpo.variants import reference as references
from sdpo.variants import score as scores
from sdpo.variants import split as splits


def alternating(rows, *, num_chunks: int):
    """Pair after pair in turn."""
    return [[row.id for row in rows[t::num_chunks]] for t in range(num_chunks)]


def lagged(step, num_updates, *, lag: int):
    """The model of some steps ago."""
    return [Window(num_updates, {f"M_{max(0, step - lag)}": 1.0})]


def soft_hinge(policy, reference, *, beta: float, sharpness: float = 1.0):
    """A hinge without a corner."""
    margin = (policy.chosen - policy.rejected) - (reference.chosen - reference.rejected)
    return softplus(sharpness * (1 - beta * margin)) / sharpness


def most_shared(lengths):
    """Responses of equal length are easy."""
    return -abs(lengths[:, 0] - lengths[:, 1])


NEW = {
    "split/alternating": (splits, alternating, "# Pair after pair in turn.\nname: alternating\nnum_chunks: 3 # T\n"),
    "reference/lagged": (
        references,
        lagged,
        "# The model of some steps ago.\nname: lagged\nlag: 2 # steps\n",
    ),
    "loss/soft_hinge": (
        losses,
        soft_hinge,
        "# A hinge without a corner.\nname: soft_hinge\nbeta: 0.1\nsharpness: 4.0\n",
    ),
    "score/most_shared": (scores, most_shared, "# Equal lengths are easy.\nname: most_shared\n"),
}


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The project with the new variants in their rooms and a copy of conf/ that has their files."""
    conf = shutil.copytree(conftest.CONF, tmp_path / "conf")
    monkeypatch.setattr(conftest, "CONF", conf)
    for option, (room, function, text) in NEW.items():
        monkeypatch.setattr(function, "__module__", room.__name__)  # as if it had been written there
        monkeypatch.setattr(room, function.__name__, function, raising=False)
        Path(conf, f"{option}.yaml").write_text(text)


def test_one_function_and_one_file_are_enough(added, run):
    folder = run("split=alternating", "reference=lagged", "loss=soft_hinge", "optim.epochs=2", "loss.beta=0.2")
    manifest, split = (json.loads((folder / name).read_text()) for name in ("manifest.json", "split.json"))
    sizes = [len(chunk) for chunk in split["chunks"]]
    assert len(sizes) == 3 and max(sizes) - min(sizes) <= 1
    first, second, third = manifest["steps"]
    assert list(first["windows"][0]["weights"]) == list(second["windows"][0]["weights"]) == [manifest["model_key"]]
    assert list(third["windows"][0]["weights"]) == [first["key"]]
    step = [entry["loss"] for entry in read_lines(folder, "train") if entry["t"] == 1]
    assert step[0] == pytest.approx(1.0045, abs=1e-4)  # log(1 + e^4) / 4, at margin 0
    assert step[-1] < step[0]


def test_a_new_score_orders_pairs(added, run):
    folder = run("split=easy_to_hard", "split.level=pair", "split.num_chunks=2", "score=most_shared")
    split = json.loads((folder / "split.json").read_text())
    easy, hard = (receipt["mean_score"] for receipt in split["receipts"])
    assert hard < easy <= 0 and split["score"]["name"] == "most_shared"
