"""The laboratory's world and model: gold reward, roles, demonstrations, tokens, sampling, KL divergence."""

import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo.config import LabData, LabModel
from sdpo.data.tokenize import content_hash
from sdpo.lab import model as lab_model
from sdpo.lab import pairs as lab_pairs
from sdpo.lab import world
from sdpo.model import sampling

PROMPTS = ["Rabcdef", "Tabcdef", "Nabcdep", "Dabcdef"]


@pytest.fixture(scope="module")
def tokenizer():
    return lab_model.tokenizer()


@pytest.fixture(scope="module")
def model():
    return lab_model.new_model(LabModel(width=32, layers=1, heads=2), seed=0)


def test_rules_by_hand():
    assert [world.answer(prompt) for prompt in PROMPTS] == ["fedcba", "cdefab", "bcdefa", "acebdf"]
    assert world.answer("Dabcdef", "reverse") == "fedcba"
    assert [world.family_of(prompt) for prompt in PROMPTS] == list(world.FAMILIES)


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        ("fedcba", 1.0),
        ("fedcba..", 0.8),
        ("fedcbb", 5 / 6),
        ("fedcb", 5 / 6 - 0.2),
        ("fedcbaa.", 1 - 0.2 - 0.1),
        (".fedcba", 0.9),
        ("abcdef", 0.0),
        ("", 0.0),
        ("fedcba" + 12 * ".", 0.0),
    ],
)
def test_gold_by_hand(response, gold):
    assert world.gold("Rabcdef", response) == pytest.approx(gold)


def test_roles_never_share_a_prompt_and_prompts_never_repeat():
    taken = set()
    drawn = {role: world.draw(60, role, random.Random(1), taken) for role in ("dev", "test", "held_out", "train")}
    assert len(taken) == 240 and all(world.role(p) == role for role, prompts in drawn.items() for p in prompts)
    assert [world.family_of(prompt) for prompt in drawn["dev"][:4]] == list(world.FAMILIES)
    assert {prompt[0] for prompt in world.draw(9, "train", random.Random(1), taken, ["deal"])} == {"D"}


def test_demonstrations_err_as_often_as_their_family_says(tokenizer):
    rows = lab_pairs.demonstrations(LabData(num_demonstrations=8000), seed=0)
    assert content_hash(rows) == content_hash(lab_pairs.demonstrations(LabData(num_demonstrations=8000), seed=0))
    assert all(len(row.rejected) == 0 for row in rows) and len({row.id for row in rows}) == 8000
    said = list(
        zip(*(tokenizer.batch_decode(ids) for ids in zip(*(row[1:3] for row in rows), strict=True)), strict=True)
    )
    said = [(prompt, text.removesuffix(tokenizer.eos_token)) for prompt, text in said]
    for name, family in world.FAMILIES.items():
        own = [(prompt, text.rstrip(world.FILLER)) for prompt, text in said if world.family_of(prompt) == name]
        assert np.mean([text == world.answer(prompt) for prompt, text in own]) == pytest.approx(family.right, abs=0.04)
        assert np.mean([text == prompt[1:] for prompt, text in own]) == pytest.approx(family.misled, abs=0.04)
    fillers = [text.count(world.FILLER) for _, text in said]
    assert max(fillers) == world.MAX_FILLERS and np.mean(np.array(fillers) > 0) == pytest.approx(0.35, abs=0.02)


def test_encoded_answers_have_the_token_ids_of_demonstrations(tokenizer):
    rows = lab_pairs.demonstrations(LabData(num_demonstrations=50), seed=0)
    prompts, texts = (
        [tokenizer.decode(ids) for ids in column]
        for column in zip(*((r.prompt, r.chosen[:-1]) for r in rows), strict=True)
    )
    answers = sampling.encode(tokenizer, prompts, texts, torch.device("cpu"))
    assert answers.text == texts
    for i, row in enumerate(rows):
        assert answers.prompt_SP[i].tolist() == row.prompt.tolist()
        assert answers.response_SR[i][answers.mask_SR[i]].tolist() == row.chosen.tolist()


def test_model_and_tokenizer_load_from_a_folder(tokenizer, model, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    again = AutoTokenizer.from_pretrained(tmp_path)
    ids = again("Rabcdef")["input_ids"]
    assert ids == tokenizer("Rabcdef")["input_ids"] and len(ids) == 7 and again.decode(ids) == "Rabcdef"
    other = lab_model.new_model(LabModel(width=32, layers=1, heads=2), seed=1)
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_samples_follow_the_seed_and_end_at_the_first_stop(tokenizer, model):
    one, same = (sampling.sample(model, tokenizer, PROMPTS, 8, seed=3) for _ in range(2))
    assert one.text == same.text != sampling.sample(model, tokenizer, PROMPTS, 8, seed=4).text
    for ids, mask in zip(one.response_SR.tolist(), one.mask_SR.tolist(), strict=True):
        length = ids.index(0) + 1 if 0 in ids else len(ids)
        assert mask == [i < length for i in range(len(ids))]
    greedy = sampling.sample(model, tokenizer, PROMPTS, 1, seed=None)
    logits = model(greedy.prompt_SP).logits[:, -1]
    assert greedy.response_SR[:, 0].tolist() == logits.argmax(dim=1).tolist()


@torch.no_grad()
def test_kl_is_the_sum_over_positions_of_the_exact_next_token_kl(tokenizer, model):
    other = lab_model.new_model(LabModel(width=32, layers=1, heads=2), seed=1)
    other.lm_head.weight.data.mul_(20)
    answers = sampling.encode(tokenizer, ["Rabcdef", "Dabcdef"], ["fe", "a..."], torch.device("cpu"))
    for i, (prompt, text) in enumerate([("Rabcdef", "fe"), ("Dabcdef", "a...")]):
        total = 0.0
        for cut in range(len(text) + 1):
            ids = tokenizer(prompt + text[:cut], return_tensors="pt")["input_ids"]
            p, q = (m(ids).logits[0, -1].double().softmax(dim=0) for m in (model, other))
            total += float((p * (p / q).log()).sum())
        assert total > 0.1
        assert sampling.kl(model, other, answers)[i].item() == pytest.approx(total, rel=1e-4)
    assert sampling.kl(model, model, answers).tolist() == [0.0, 0.0]
