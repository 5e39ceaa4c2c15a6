"""Reward models and base models, against running them on one sequence at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, random_model
from toys import prepare, reward_model
from transformers import AutoModelForSequenceClassification

from sdpo.curriculum import score_inputs
from sdpo.errors import UserError
from sdpo.evals import reward_model as judge
from sdpo.model.logprobs import naive_logprobs
from sdpo.variants import score as scores

CHAT = "{% for turn in messages %}<s>{{ turn['role'] }}: {{ turn['content'] }}</s>{% endfor %}"


@pytest.fixture(scope="module")
def made(toy, tmp_path_factory):
    return prepare(toy, tmp_path_factory.mktemp("store"), "launch.tokens_per_pack=200")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return reward_model(tmp_path_factory.mktemp("rewards"), CHAT)


def test_rewards_are_those_of_one_conversation_at_a_time(made, classifier):
    _, inputs = made
    pairs = inputs.train.pairs[:9]
    settings = {"path": str(classifier), "revision": None, "template": None}
    rewards = judge.rewards(settings, pairs, inputs.runner)
    network, tokenizer = AutoModelForSequenceClassification.from_pretrained(classifier), byte_tokenizer()
    for pair, ours in zip(pairs, rewards, strict=True):
        for answer, reward in zip((pair.chosen, pair.rejected), ours, strict=True):
            text = f"<s>user: {pair.prompt[0]['content']}</s><s>assistant: {answer}</s>"
            with torch.no_grad():
                expected = network(tokenizer(text, return_tensors="pt").input_ids).logits.item()
            assert reward == pytest.approx(expected, abs=1e-5)
    assert np.ptp(rewards) > 1e-3


def test_rewards_are_stored_and_equal_answers_are_read_once(made, classifier, monkeypatch):
    _, inputs = made
    pairs = inputs.train.pairs[:5]
    settings = {"path": str(classifier), "revision": None, "template": "chatml"}
    read, classify = [], judge._classify
    monkeypatch.setattr(
        judge, "_classify", lambda model, given, runner: read.extend(given) or classify(model, given, runner)
    )
    pairs = [*pairs, replace(pairs[0], chosen=pairs[1].chosen, rejected=pairs[1].chosen)]  # in the end twice the same
    first = judge.rewards(settings, pairs, inputs.runner)
    assert len(read) == 11 and first[-1, 0] == first[-1, 1]
    monkeypatch.setattr(judge, "_load", lambda *_: pytest.fail("run again"))
    assert np.array_equal(judge.rewards(settings, pairs, inputs.runner), first)


def test_a_language_model_is_not_a_reward_model(made, toy):
    _, inputs = made
    settings = {"path": str(toy / "model"), "revision": None, "template": "plain"}
    with pytest.raises(UserError, match="is not a reward model: it has no score.weight"):
        judge.rewards(settings, inputs.train.pairs[:2], inputs.runner)


def test_batches_hold_equal_lengths_within_the_budget():
    sequences = [np.zeros(n) for n in (3, 5, 3, 3, 9)]
    assert judge._batches(sequences, 6) == [[0, 2], [3], [1], [4]]


def test_implicit_reward_reads_the_same_tokens_under_the_base(made, tmp_path):
    settings, inputs = made
    base = random_model(seed=5)
    base.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    rows = inputs.train.rows[:6]
    values = judge.base_logps({"path": str(tmp_path), "revision": None}, rows, inputs.runner)
    with torch.no_grad():
        expected = [naive_logprobs(base, row) for row in rows]
    np.testing.assert_allclose(values, expected, rtol=1e-4)


def test_a_base_with_other_tokens_is_refused(made, tmp_path):
    _, inputs = made
    random_model().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace('"a": ', '"other": '))
    with pytest.raises(UserError, match="is another token than in the run's model"):
        judge.base_logps({"path": str(tmp_path), "revision": None}, inputs.train.rows, inputs.runner)


def test_a_score_that_is_not_finite_names_its_pair(made):
    settings, inputs = made

    def broken(lengths):
        return np.where(np.arange(len(lengths)) == 3, np.nan, 1.0)

    with pytest.raises(UserError, match=f"training pair {inputs.train.ids[3]} is not a finite number"):
        score_inputs.scores(inputs, settings, broken, inputs.initial, inputs.train)
    assert len(score_inputs.scores(inputs, settings, scores.length_gap, inputs.initial, inputs.train)) == len(
        inputs.train
    )
