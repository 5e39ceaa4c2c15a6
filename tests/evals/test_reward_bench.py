"""Accuracy of the implicit reward, by category, against one forward pass per response."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, random_model
from toys import prepare

from sdpo.errors import UserError
from sdpo.evals import reward_model, suites
from sdpo.model import hub
from sdpo.store.artifacts import Artifact

COLUMNS = {"source": "subset", "prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}


@pytest.fixture(scope="module")
def made(toy, tmp_path_factory):
    """What a run starts from, and a model other than S."""
    folder = tmp_path_factory.mktemp("other")
    random_model(seed=3).save_pretrained(folder)
    return prepare(toy, folder / "store")[1], Artifact(hub.fingerprint(folder), folder, reused=True)


@pytest.fixture
def pairs(tmp_path):
    """20 pairs in two categories, in the columns of RewardBench."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdef"), 6)) for _ in range(60)]
    rows = [
        {"prompt": words[i], "chosen": words[20 + i], "rejected": words[40 + i], "subset": "chat" if i < 8 else "code"}
        for i in range(20)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path, rows


@torch.no_grad()
def logp(model, prompt, answer):
    tokenizer = byte_tokenizer()
    first, rest = tokenizer(prompt).input_ids, tokenizer(answer).input_ids + [tokenizer.eos_token_id]
    logps = model(torch.tensor([first + rest])).logits[0, len(first) - 1 : -1].log_softmax(-1)
    return logps[range(len(rest)), rest].sum().item()


def test_accuracy_equals_a_naive_computation(made, pairs, monkeypatch):
    inputs, other = made
    path, rows = pairs
    found = suites.reward_bench(other, inputs.initial, inputs.runner, pairs=[str(path)], columns=COLUMNS)
    policy, initial = random_model(seed=3), random_model()
    margins = []
    for row in rows:
        chosen, rejected = (
            logp(policy, row["prompt"], row[side]) - logp(initial, row["prompt"], row[side])
            for side in ("chosen", "rejected")
        )
        margins.append(chosen - rejected)
    right = np.array(margins) > 0
    values = {name: measure["value"] for name, measure in found.items()}
    assert values["reward_bench/accuracy"] == right.mean()
    assert values["reward_bench/chat/accuracy"] == right[:8].mean() != right[8:].mean()
    assert values["reward_bench/code/accuracy"] == right[8:].mean() and found["reward_bench/code/accuracy"]["n"] == 12
    assert values["reward_bench/mean_of_categories"] == pytest.approx((right[:8].mean() + right[8:].mean()) / 2)
    assert values["reward_bench/margin"] == pytest.approx(np.mean(margins), abs=1e-4)
    monkeypatch.setattr(inputs.runner, "load", lambda *_: pytest.fail("a model is run again"))
    data = replace(inputs.runner.config.data, limit=3, revisions={"a/b": "1"}, held_out_sets={"other": ["none.jsonl"]})
    monkeypatch.setattr(inputs.runner, "config", replace(inputs.runner.config, data=data))  # these are of other pairs
    again = suites.reward_bench(other, inputs.initial, inputs.runner, pairs=[str(path)], columns=COLUMNS)
    assert again == found
    of_initial = suites.reward_bench(inputs.initial, inputs.initial, inputs.runner, pairs=[str(path)], columns=COLUMNS)
    assert {name: measure["value"] for name, measure in of_initial.items()} == dict.fromkeys(found)


def test_the_score_of_reward_bench_by_hand():
    """Only math and one of six languages are right, and one of two pairs of a chat category: other sections are 0."""
    names = [category for members in reward_model.SECTIONS.values() for category in members]
    categories = np.array(names + ["alpacaeval-easy"], dtype=object)
    right = np.isin(categories, ["math-prm", "hep-go"]).astype(float)
    right[-1] = 1.0
    found = reward_model.accuracies(right, categories)
    assert len(names) == 23 and found["sections/chat"]["value"] == pytest.approx(1 / 6)  # one of six pairs
    assert found["sections/reasoning"]["value"] == pytest.approx((984 + 1) / (984 + 6))
    assert found["score"]["value"] == pytest.approx((1 / 6 + 985 / 990) / 4)
    assert "score" not in reward_model.accuracies(right[1:-1], categories[1:-1])


def test_no_pair_is_left_out_silently(made, tmp_path):
    inputs, other = made
    for row, problem in (
        (
            {"prompt": "a", "chosen": "b" * 60, "rejected": "c"},
            r"has 6[0-9] tokens, more than evaluate\.reward_bench\.max_tokens=32 .*; raise it$",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "states no preference"),
        ({"prompt": "a", "chosen": "b</s>", "rejected": "b"}, "are the same tokens"),
    ):
        (tmp_path / "bad.jsonl").write_text(
            json.dumps(row) + "\n" + json.dumps({**row, "chosen": "d", "rejected": "e"})
        )
        with pytest.raises(UserError, match=problem):
            suites.reward_bench(
                other, inputs.initial, inputs.runner, pairs=[str(tmp_path / "bad.jsonl")], max_tokens=32
            )
