"""Answers to prompts: equal to one prompt at a time, with an exact KL, stored, and in the formats of benchmarks."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, random_model, read_lines
from toys import prepare, reward_model

from sdpo.curriculum.rounds import Round
from sdpo.data import prompts
from sdpo.errors import UserError
from sdpo.evals import answer_formats, generation, kl, suites
from sdpo.evals import reward_model as judge
from sdpo.evals.decoding import Decoding
from sdpo.model import hub, sampling
from sdpo.store.artifacts import Artifact

GREEDY = Decoding(temperature=0.0, max_new_tokens=6, batch_size=2, seed=0)
ROWS = [
    {"question_id": 81, "turns": ["abc", "and then?"]},
    {"question_id": 82, "turns": ["a much longer prompt"]},
    {"question_id": 83, "turns": ["de"]},
]


@pytest.fixture(scope="module")
def made(toy, tmp_path_factory):
    return prepare(toy, tmp_path_factory.mktemp("store"))[1]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return prompts.read(str(path))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model other than S."""
    folder = tmp_path_factory.mktemp("other")
    random_model(seed=3).save_pretrained(folder)
    return Artifact(hub.fingerprint(folder), folder, reused=True)


@torch.no_grad()
def argmax_answer(model, prompt_ids, num_tokens, stop):
    ids = []
    while len(ids) < num_tokens and stop not in ids:
        ids.append(model(torch.tensor([prompt_ids + ids])).logits[0, -1].argmax().item())
    return ids


def test_greedy_answers_are_those_of_one_prompt_at_a_time(made, questions):
    tokenizer, model = byte_tokenizer(), random_model()
    found = generation.answers(made.initial, questions, GREEDY, made.runner)
    assert [len(turns) for turns in found] == [2, 1, 1]
    for prompt, turns in zip(questions, found, strict=True):
        text = prompt.turns[0]
        for question, answer in zip(prompt.turns, turns, strict=True):
            text = text if question == prompt.turns[0] else text + turns[0]["text"] + question
            assert answer["prompt_ids"] == tokenizer(text).input_ids
            assert answer["ids"] == argmax_answer(model, answer["prompt_ids"], 6, tokenizer.eos_token_id)


def test_an_answer_follows_what_came_before_its_prompt_and_only_then_has_another_key(made, questions):
    said = ({"role": "user", "content": "abc"}, {"role": "assistant", "content": "xy"})
    (alone,) = generation.answers(made.initial, [prompts.Prompt(1, ["abcxyde"], "a")], GREEDY, made.runner)
    (after,) = generation.answers(made.initial, [prompts.Prompt(1, ["de"], "a", said)], GREEDY, made.runner)
    assert after == alone
    assert [len(prompt.determinants()) for prompt in (questions[0], questions[0]._replace(before=said))] == [3, 4]


@torch.no_grad()
def test_divergence_is_exact_and_summed_over_positions(made, questions, other):
    here, there = random_model(seed=3), random_model()
    found = kl.kl_to_initial(other, made.initial, questions, GREEDY, made.runner)
    drawn = generation.answers(other, questions, GREEDY._replace(temperature=1.0), made.runner)
    for value, turns in zip(found, drawn, strict=True):
        total = 0.0
        for answer in turns:
            for cut in range(len(answer["ids"])):
                ids = torch.tensor([answer["prompt_ids"] + answer["ids"][:cut]])
                p, q = (m(ids).logits[0, -1].double().log_softmax(0) for m in (here, there))
                total += (p.exp() * (p - q)).sum().item()
        assert value == pytest.approx(total, rel=1e-4) and value > 0.01
    assert kl.kl_to_initial(made.initial, made.initial, questions, GREEDY, made.runner) == [0.0] * 3


def test_prompts_are_padded_on_the_left_and_answers_end_with_their_first_stop_token():
    seen = {}

    def generate(tokens_BT, attention_mask):
        seen["tokens"], seen["mask"] = tokens_BT.tolist(), attention_mask.tolist()
        return torch.cat([tokens_BT, torch.tensor([[5, 2, 6, 2], [7, 8, 9, 4]])], dim=1)

    network = SimpleNamespace(device="cpu", generate=generate)
    assert sampling.continuations(network, [[3], [1, 3]], stops=[2]) == [[5, 2], [7, 8, 9, 4]]
    assert seen == {"tokens": [[2, 3], [1, 3]], "mask": [[0, 1], [1, 1]]}


def test_answers_are_generated_once_and_again_for_other_settings(made, questions, monkeypatch):
    warm = GREEDY._replace(temperature=1.0, seed=5)
    first = generation.answers(made.initial, questions, warm, made.runner)
    assert first != generation.answers(made.initial, questions, warm._replace(seed=6), made.runner)
    monkeypatch.setattr(generation, "generate", lambda *_: pytest.fail("generated again"))
    assert generation.answers(made.initial, questions, warm, made.runner) == first
    with pytest.raises(pytest.fail.Exception, match="again"):
        generation.answers(made.initial, questions[:2], warm, made.runner)


@pytest.fixture(scope="module")
def stops_at_7(toy, tmp_path_factory):
    """The folder of a model that always says token 7, and whose generation config names it as a stop."""
    folder = tmp_path_factory.mktemp("stops") / "model"
    shutil.copytree(toy / "model", folder)
    model = random_model("phi")
    with torch.no_grad():
        model.lm_head.bias[7] = 100
    model.generation_config.eos_token_id = [2, 7]
    model.save_pretrained(folder)
    return folder


def test_answers_end_at_every_stop_that_s_names_and_only_then_have_another_key(made, stops_at_7, toy, tmp_path):
    rounds = ["rounds=on_policy", f"rounds.path={stops_at_7}"]
    config, inputs = prepare(toy, tmp_path, f"model.path={stops_at_7}", *rounds)
    asked = [prompts.Prompt(1, ["abc"], "a"), prompts.Prompt(2, ["defg"], "a")]
    for (answer,) in generation.answers(inputs.initial, asked, GREEDY, inputs.runner):
        assert (answer["ids"], answer["text"], answer["ended"]) == ([7], "", True)
    (manifest,) = (tmp_path / "answers").glob("*/manifest.json")
    assert json.loads(manifest.read_text())["stops"] == [7]
    assert Round(inputs, config, np.arange(3), inputs.initial).determinants["stops"] == [7]
    generation.answers(made.initial, asked, GREEDY, made.runner)
    kept = [json.loads(path.read_text()) for path in made.runner.store.root.glob("answers/*/manifest.json")]
    assert kept and not any("stops" in one for one in kept)
    assert "stops" not in Round(made, config, np.arange(3), made.initial).determinants


def test_answers_while_a_step_trains_end_at_every_stop_that_s_names(run, stops_at_7, tmp_path):
    (tmp_path / "ask.txt").write_text("abc\nde\n")
    probed = [f"probe.file={tmp_path / 'ask.txt'}", "probe.answers_every=1", "probe.max_new_tokens=4"]
    folder = run(f"model.path={stops_at_7}", "split=all_at_once", "evaluate=[]", *probed)
    samples = [answer for entry in read_lines(folder, "train") for answer in entry["samples"]]
    assert {answer["answer"] for answer in samples} == {""}


def test_a_prompt_that_leaves_too_few_tokens_for_its_answer_is_refused(made, questions):
    with pytest.raises(UserError, match="reads 512 tokens, but the longest prompt and its answer may have 52"):
        generation.answers(made.initial, questions, GREEDY._replace(max_new_tokens=500), made.runner)


def test_formats_of_alpaca_eval_and_mt_bench(tmp_path, questions):
    texts = [[{"text": f"{prompt.id}/{turn}"} for turn in range(len(prompt.turns))] for prompt in questions]
    answer_formats.write_formats(tmp_path, "run-M_1", answer_formats.transcripts(questions, texts))
    rows = [json.loads(line) for line in (tmp_path / "run-M_1.mt_bench.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [81, 82, 83] and {row["model_id"] for row in rows} == {"run-M_1"}
    assert rows[0]["choices"] == [{"index": 0, "turns": ["81/0", "81/1"]}]
    (first, *_) = json.loads((tmp_path / "run-M_1.alpaca_eval.json").read_text())
    assert first == {"instruction": "abc", "output": "81/0", "generator": "run-M_1", "dataset": "questions"}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("plain.txt", "one\n\ntwo\n", [(1, ["one"], "plain"), (3, ["two"], "plain")]),
        ("eval.json", '[{"instruction": "do", "dataset": "koala"}]', [(1, ["do"], "koala")]),
        ("mt.jsonl", '{"question_id": 81, "turns": ["a", "b"]}', [(81, ["a", "b"], "mt")]),
    ],
)
def test_prompt_files(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    assert prompts.read(str(tmp_path / name)) == [prompts.Prompt(*fields) for fields in expected]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            '{"prompt": "a"}\n{"prompt": " "}',
            "row 2: has no text of a user in one of the fields instruction, ",
        ),
        ('{"prompt": ', "row 1: is not valid JSON"),
        ('["a"]', "row 1: is not a JSON object"),
        ('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}', "an id stands twice"),
        ("", "holds no prompt"),
    ],
)
def test_a_bad_prompt_file_is_one_sentence(tmp_path, content, sentence):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(UserError, match=sentence):
        prompts.read(str(tmp_path / "bad.jsonl"))


def test_a_run_reports_its_answers(run, tmp_path):
    (tmp_path / "ask.txt").write_text("abc\nde\n")
    judge = reward_model(tmp_path / "judge", "{% for turn in messages %}{{ turn['content'] }}{% endfor %}</s>")
    settings = [f"{key}.file={tmp_path / 'ask.txt'}" for key in ("evaluate.generate", "evaluate.win_rate")]
    settings += [f"{key}.max_new_tokens=4" for key in ("evaluate.generate", "evaluate.win_rate")]
    settings += [f"evaluate.win_rate.path={judge}", "split=all_at_once", "reference=initial"]
    folder = run("evaluate=[generate,win_rate]", *settings)
    before, after = read_lines(folder, "answers")
    assert (before["t"], after["t"]) == (0, 1) and after["decoding"]["max_new_tokens"] == 4
    for t, said in enumerate((before, after)):
        alpaca = json.loads((folder / "answers" / f"run-M_{t}.alpaca_eval.json").read_text())
        assert [row["output"] for row in alpaca] == [row["answers"][0] for row in said["answers"]]
    start, end = (entry["eval"] for entry in read_lines(folder, "eval"))
    assert start["generate/kl"]["value"] == 0 < end["generate/kl"]["value"] and end["generate/kl"]["n"] == 2
    assert start["win_rate"]["value"] is None and end["win_rate"]["value"] in (0.0, 0.25, 0.5, 0.75, 1.0)


def test_win_rate_counts_what_the_reward_model_prefers(made, questions, other, tmp_path, monkeypatch):
    path = tmp_path / "ask.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    rewards_N2 = np.array([[2.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    judged = []
    monkeypatch.setattr(judge, "rewards", lambda settings, pairs, runner: judged.extend(pairs) or rewards_N2)
    settings = {"file": str(path), "path": "rm", "max_new_tokens": 6, "batch_size": 2}
    found = suites.win_rate(other, made.initial, made.runner, **settings)
    assert found["win_rate"]["value"] == 0.5 and found["win_rate/reward_gap"]["value"] == 0.0
    ours, theirs = (generation.answers(model, questions, GREEDY, made.runner) for model in (other, made.initial))
    expected = [(a[0]["text"], b[0]["text"]) for a, b in zip(ours, theirs, strict=True)]
    assert [(pair.chosen, pair.rejected) for pair in judged] == expected
    longer = np.mean([len(a) - len(b) for a, b in expected])
    assert found["win_rate/longer"]["value"] == longer
    of_initial = suites.win_rate(made.initial, made.initial, made.runner, **settings)
    assert {name: measure["value"] for name, measure in of_initial.items()} == dict.fromkeys(found)
