"""Decoding: presets equal their sources, MT-Bench's temperature depends on the category, top_p cuts where it should."""

import json
from collections import Counter

import pytest
import torch
from conftest import random_model
from toys import prepare

from sdpo.data import prompts
from sdpo.data.prompts import Prompt
from sdpo.errors import UserError
from sdpo.evals import generation
from sdpo.evals.decoding import PRESETS, Decoding, choose
from sdpo.model.sampling import continuations

SOURCES = {  # temperature, top_p and largest number of tokens, copied from the files that the presets name
    "alpaca_eval": (0.7, 1.0, 2048),
    "arena_hard": (0.0, 1.0, 4096),
    "wild_bench": (0.0, 1.0, 4096),
}
OF_CATEGORIES = {
    **dict.fromkeys(("writing", "roleplay"), 0.7),
    **dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0),
    **dict.fromkeys(("stem", "humanities"), 0.1),
}


def test_presets_are_those_of_their_sources():
    for name, settings in SOURCES.items():
        found = choose(name, None, None, None, batch_size=16, seed=0)
        assert (found.temperature, found.top_p, found.max_new_tokens) == settings
    assert choose("mt_bench", None, None, None, 16, 0) == Decoding(OF_CATEGORIES, 1024, 16, 0, 1.0)
    assert choose("arena_hard", None, 0.9, 64, 16, 0) == Decoding(0.0, 64, 16, 0, 0.9)  # what is given goes first
    assert choose(None, None, None, None, 16, 0) == Decoding(0.0, 512, 16, 0, 1.0)
    assert all(preset.source for preset in PRESETS.values())
    with pytest.raises(UserError, match="no preset mtbench; there are alpaca_eval, arena_hard, mt_bench, wild_bench"):
        choose("mtbench", None, None, None, 16, 0)
    with pytest.raises(UserError, match="top_p=0 is no probability"):
        choose(None, None, 0, None, 16, 0)


def test_a_prompt_is_answered_at_the_temperature_of_its_category(toy, tmp_path):
    inputs = prepare(toy, tmp_path)[1]
    asked = [Prompt(i, [f"{i} abc"], category) for i, category in enumerate(("math", "writing", "coding", "writing"))]
    decoding = choose("mt_bench", None, None, 6, batch_size=2, seed=0)
    found = generation.answers(inputs.initial, asked, decoding, inputs.runner)
    for category, temperature in (("math coding", 0.0), ("writing", 0.7)):
        members = [i for i, prompt in enumerate(asked) if prompt.dataset in category]
        alone = generation.answers(
            inputs.initial, [asked[i] for i in members], Decoding(temperature, 6, 2, 0), inputs.runner
        )
        assert [found[i] for i in members] == alone
    with pytest.raises(UserError, match=r"prompt 7 is of the category 'poetry', which has no temperature"):
        generation.answers(inputs.initial, [Prompt(7, ["abc"], "poetry")], decoding, inputs.runner)


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1.0, {10: 0.5, 11: 0.3, 12: 0.15, 13: 0.05}),
        (0.9, {10: 0.5 / 0.95, 11: 0.3 / 0.95, 12: 0.15 / 0.95}),  # 0.8 is not enough
        (0.7, {10: 0.625, 11: 0.375}),  # 0.5 is not enough
        (0.4, {10: 1.0}),
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_have_the_probability(top_p, expected):
    network = random_model("phi")
    with torch.no_grad():  # whatever the prompt, four tokens have the probabilities 0.5, 0.3, 0.15 and 0.05
        network.lm_head.weight.zero_()
        network.lm_head.bias.fill_(-1e4)
        network.lm_head.bias[10:14] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    network.generation_config = generation._generation_config(Decoding(1.0, 1, 1, 0, top_p), [2])
    torch.manual_seed(0)
    drawn = Counter(ids[0] for ids in continuations(network, [[5]] * 4000, [2]))
    assert set(drawn) == set(expected)
    for token, probability in expected.items():
        assert drawn[token] / 4000 == pytest.approx(probability, abs=0.03)  # 3.8 standard errors or more


def test_top_p_is_in_the_key_only_if_it_cuts():
    assert Decoding(1.0, 4, 2, 7).determinants() == {
        "temperature": 1.0,
        "max_new_tokens": 4,
        "batch_size": 2,
        "seed": 7,
    }
    assert Decoding(1.0, 4, 2, 7, 0.9).determinants()["top_p"] == 0.9


def test_prompt_sets_of_arena_hard_and_of_data_sets(tmp_path):
    rows = [{"uid": "a1", "category": "hard_prompt", "turns": [{"content": "Why?"}]}, {"uid": "a2", "prompt": "How?"}]
    (tmp_path / "set").mkdir()
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(map(json.dumps, [{"prompt": "Why?"}, {"prompt": "How?"}])))
    assert prompts.read(str(tmp_path / "questions.jsonl")) == [
        Prompt("a1", ["Why?"], "hard_prompt"),
        Prompt("a2", ["How?"], "questions"),
    ]
    assert prompts.read(str(tmp_path / "set")) == [
        Prompt(1, ["Why?"], "set"),
        Prompt(2, ["How?"], "set"),
    ]
    turns = [{"role": role, "content": "Why?"} for role in ("user", "assistant")]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"turns": turns}))
    with pytest.raises(UserError, match="row 1: has no text of a user"):  # the answer would be lost
        prompts.read(str(tmp_path / "chat.jsonl"))
