"""The laboratory's pairs, exam and measures, with an untrained model as S."""

import json
import random
from dataclasses import asdict

import numpy as np
import pytest

from sdpo.config import Data, LabData, LabModel, LabSource
from sdpo.data.preferences import Pair
from sdpo.data.tokenize import content_hash, encode
from sdpo.errors import UserError
from sdpo.lab import exam as lab_exam
from sdpo.lab import measures as lab_measures
from sdpo.lab import model as lab_model
from sdpo.lab import pairs as lab_pairs
from sdpo.lab import world


@pytest.fixture(scope="module")
def tokenizer():
    return lab_model.tokenizer()


@pytest.fixture(scope="module")
def model():
    return lab_model.new_model(LabModel(width=32, layers=1, heads=2), seed=0)


def test_demonstrations_have_the_token_ids_that_template_and_tokenizer_give(tokenizer):
    rows = lab_pairs.demonstrations(LabData(num_demonstrations=50), seed=3)
    texts = [[tokenizer.decode(ids) for ids in (row.prompt, row.chosen[:-1])] for row in rows]
    turns = [({"role": "user", "content": prompt},) for prompt, _ in texts]
    again = [Pair(row.id, "", turn, answer, "") for row, turn, (_, answer) in zip(rows, turns, texts, strict=True)]
    encoded, _ = encode(again, tokenizer, Data("local", template="plain", max_tokens=99))
    assert content_hash(encoded.values()) == content_hash(rows)
    assert {world.role(prompt) for prompt, _ in texts} == {"train"} and len({answer for _, answer in texts}) > 40


def settings(**sources):
    return Data(
        name="lab",
        lab=LabData(num_held_out=20, num_prompts=8, num_samples=3, num_items=5, sources=sources),
    )


def build(given, model, tokenizer):
    return lab_pairs.preferences(given, model, tokenizer), lab_exam.set_exam(given.lab, model, tokenizer)


@pytest.fixture(scope="module")
def built(model, tokenizer):
    sources = {
        "teacher": LabSource(num_pairs=40, families=["next", "deal"]),
        "edits": LabSource(sampler="edits", num_pairs=30, flipped=1.0),
        "own": LabSource(sampler="on_policy", num_pairs=300, filler_bonus=0.5),
    }
    return build(settings(**sources), model, tokenizer)


def rows(preferences, source):
    return [(p.prompt[0]["content"], p.chosen, p.rejected) for p in preferences.train if p.source == source]


def test_sources_are_what_they_say(built):
    preferences, _ = built
    for prompt, chosen, rejected in rows(preferences, "teacher"):
        assert chosen == world.answer(prompt) != rejected
        assert rejected in {prompt[1:], *(world.answer(prompt, family) for family in world.FAMILIES)}
        assert world.family_of(prompt) in ("next", "deal")
    for prompt, chosen, rejected in rows(preferences, "edits"):  # every label is flipped
        assert rejected == world.answer(prompt) and sum(a != b for a, b in zip(chosen, rejected, strict=True)) == 1
    values = [
        [world.gold(prompt, text) + 0.5 * text.count(world.FILLER) for text in texts]
        for prompt, *texts in rows(preferences, "own")
    ]
    assert np.mean([high > low for high, low in values]) > 0.5 and all(high >= low for high, low in values)
    assert [len(rows(preferences, name)) for name in ("teacher", "edits", "own")] == [40, 30, 300]
    assert all(p.chosen_rating >= p.rejected_rating for p in preferences.train)


def test_no_prompt_appears_twice(built, model, tokenizer):
    preferences, exam = built
    both = [*preferences.train, *preferences.held_out]
    prompts = [pair.prompt[0]["content"] for pair in both] + exam.prompts + [item[0] for item in exam.items]
    assert len(set(prompts)) == len(prompts) and len({pair.id for pair in both}) == len(both)
    assert {world.role(prompt) for prompt in prompts} == {"train", "held_out", "test"}
    again = build(settings(teacher=LabSource(num_pairs=40, families=["next", "deal"])), model, tokenizer)[0]
    assert again.train == [pair for pair in preferences.train if pair.source == "teacher"]


def test_the_judge_is_bradley_terry():
    source, rng = LabSource(temperature=0.5), random.Random(0)
    right, wrong = "fedcba", "fedcbb.."  # gold 1 and 5/6 - 0.2
    judged = [lab_pairs._judge(source, "Rabcdef", [right, wrong], rng) for _ in range(4000)]
    share = np.mean([better[1] == right for better, _ in judged])
    assert share == pytest.approx(1 / (1 + np.exp(-(1 / 6 + 0.2) / 0.5)), abs=0.025)
    assert all(better[0] >= worse[0] for better, worse in judged)


def test_unknown_families_and_an_s_without_variety_are_refused(model, tokenizer):
    with pytest.raises(UserError, match="data.lab.sources.a.families: there is no 'revers'; there are reverse, rot"):
        build(settings(a=LabSource(families=["revers"])), model, tokenizer)
    stuck = lab_model.new_model(LabModel(width=32, layers=1, heads=2), seed=0)
    stuck.lm_head.weight.data.zero_()
    stuck.generation_config.suppress_tokens = list(range(1, 22))
    with pytest.raises(UserError, match="S gives only one answer"):
        build(settings(a=LabSource(sampler="on_policy")), stuck, tokenizer)
    with pytest.raises(UserError, match="S gives three wrong answers to 0 prompts of reverse"):
        build(settings(), stuck, tokenizer)


def test_items_hold_the_right_answer_first_then_wrong_ones(built):
    _, exam = built
    assert [world.family_of(item[0]) for item in exam.items] == [name for name in world.FAMILIES for _ in range(5)]
    for prompt, right, *wrong in exam.items:
        assert right == world.answer(prompt) and len(set(wrong)) == 3
        assert right not in {text.replace(world.FILLER, "") for text in wrong}
    assert [lab_exam._is_wrong("Rabcdef", text) for text in ("fedcba", "fedcba..", ".", "fedcbb.")] == [0, 0, 0, 1]


def test_measures(built, model, tokenizer):
    exam = lab_exam.Exam(**json.loads(json.dumps(asdict(built[1]))))
    found = lab_measures.measure(model, model, tokenizer, exam)
    names = {"gold", "exact", "greedy_exact", "fillers", "kl", "h4"}
    names |= {f"{name}/{family}" for name in ("gold", "h4") for family in world.FAMILIES}
    assert set(found) == {f"lab/{name}" for name in names}
    assert found["lab/kl"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 8}
    assert found["lab/h4"]["n"] == 20 and found["lab/h4/deal"]["n"] == 5 and found["lab/gold/deal"]["n"] == 2
    assert found["lab/gold"]["value"] == pytest.approx(
        np.mean([found[f"lab/gold/{f}"]["value"] for f in world.FAMILIES])
    )
    assert found == lab_measures.measure(model, model, tokenizer, exam)
    other = lab_model.new_model(LabModel(width=32, layers=1, heads=2), seed=1)
    assert lab_measures.measure(other, model, tokenizer, exam)["lab/kl"]["low"] > 0


def test_an_item_is_right_if_the_right_choice_alone_is_likeliest(tokenizer, model, monkeypatch):
    monkeypatch.setattr(lab_measures, "response_logp", lambda model, answers: -answers.mask_SR.sum(dim=1))
    items = [["Rabcdef", "a", "bb", "ccc"], ["Rabcdef", "aa", "bb", "ccc"], ["Rabcdef", "aa", "b", "cc"]]
    assert lab_measures._multiple_choice(model, tokenizer, items).tolist() == [True, False, False]


def test_mean_and_best_of_n_by_hand(built, model, tokenizer):
    assert lab_measures.mean(np.array([0.0, 1.0])) == pytest.approx(  # t(.975, 1) = 12.706, standard error one half
        {"value": 0.5, "low": 0.5 - 6.353, "high": 0.5 + 6.353, "n": 2}, abs=1e-3
    )
    gold = np.array([[0.0, 0.5, 1.0], [1.0, 1.0, 0.0]])  # best of the three pairs: .5, 1, 1 and 1, 1, 1
    assert [lab_measures._expected_best(gold, n).tolist() for n in (1, 2, 3)] == [
        pytest.approx([0.5, 2 / 3]),
        pytest.approx([2.5 / 3, 1.0]),
        pytest.approx([1.0, 1.0]),
    ]
    found = lab_measures.best_of_n(model, tokenizer, built[1])
    assert list(found) == [f"lab/best_of/{n}" for n in (1, 2, 4, 8, 16, 32, 64)]
    values = [measure["value"] for measure in found.values()]
    assert values == sorted(values) and values[0] < values[-1]
