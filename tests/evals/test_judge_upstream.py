"""Judges of MT-Bench and Arena-Hard from files in their formats (with words of our own), against a local endpoint."""

import json

import pytest
import yaml
from judge_server import endpoint, sections, serving

from sdpo.data.prompts import Prompt
from sdpo.errors import UserError
from sdpo.evals.judge import answer_files, mt_bench, protocols
from sdpo.evals.judge.case import Case
from sdpo.store.artifacts import Store

ARENA = {
    "judge_model": "gpt-4.1",
    "bench_name": "arena-hard-v2.0",
    "reference": None,
    "model_list": ["x"],
    "temperature": 0.0,
    "max_tokens": 16000,
    "regex_patterns": [r"\[\[([AB<>=]+)\]\]", r"\[([AB<>=]+)\]"],
    "system_prompt": "You judge.",
    "prompt_template": "# Q\n\n{QUESTION}\n\n# A\n\n{ANSWER_A}\n\n# B\n\n{ANSWER_B}",
}
SINGLE = "# Q\n\n{question}\n\n# A\n\n{answer}"
SECOND = "# Q\n\n{question_1}{question_2}\n\n# A\n\n{answer_2}"
TEMPLATES = {
    "single-v1": SINGLE,
    "single-v1-multi-turn": SECOND,
    "single-math-v1": SINGLE + "\n\n# R\n\n{ref_answer_1}",
    "single-math-v1-multi-turn": SECOND + "\n\n# R\n\n{ref_answer_1}{ref_answer_2}",
    "pair-v2": "{question} {answer_a} {answer_b}",
}


def lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def config(path, **changes):
    path.write_text(yaml.safe_dump({key: value for key, value in (ARENA | changes).items() if value != "gone"}))
    return str(path)


def judge_prompts(path, **changes):
    row = {"type": "single", "system_prompt": "You help.", "output_format": "[[rating]]"} | changes
    return lines(path, [{"name": name, "prompt_template": text} | row for name, text in TEMPLATES.items()])


def reference_answers(path, turns):
    return lines(path, [{"question_id": 2, "model_id": "gpt-4", "choices": [{"index": 0, "turns": turns}]}])


def verdicts(rules, case, server, folder):
    rules.check(case.prompts)
    return rules.verdicts(case, endpoint(server, **rules.asking._asdict()), Store(folder))


def test_the_verdict_that_arena_hard_counts(tmp_path):
    rules = protocols.choose(config(tmp_path / "arena.yaml"), None, None)
    said = {
        "[[A>B]] ... my final verdict is tie: [[A=B]]": "A=B",  # the last one of the first pattern
        "[[a>>b]]": "A>>B",
        "[B>A]": "B>A",
        "[[A>B]], not [B>>A]": "A>B",
        "[[A>]]": None,
        "A is better": None,
    }
    assert {text: rules.verdict(text) for text in said} == said


def test_both_games_of_arena_hard_count_and_strong_verdicts_three_times(tmp_path):
    """The model's score: 3 x 1 and 3 x 1 for `best` against `fair`, 0 and 0.5 for `poor`, nothing for `mute`."""
    wins = {("best", "fair"): "[[A>>B]]", ("fair", "best"): "[[B>>A]]", ("poor", "fair"): "[[B>A]]"}
    wins |= {("fair", "poor"): "[[A=B]]", ("mute", "fair"): "no", ("fair", "mute"): "[[A=B]]"}

    def judge(asked):
        assert asked["max_tokens"] == 16000 and asked["messages"][0] == {"role": "system", "content": "You judge."}
        question, a, b = sections(asked)
        return (question, a, b), wins[a, b], None

    names = ["best", "poor", "mute"]
    case = Case([Prompt(name, [name], "hard_prompt") for name in names], [[name] for name in names], ["fair"] * 3, "o3")
    rules = protocols.choose(config(tmp_path / "arena.yaml"), None, None)
    with serving(judge) as server:
        found = verdicts(rules, case, server, tmp_path)
    assert [[game["score"] for game in row["games"]] for row in found] == [
        ["B>>A", "A>>B"],
        ["A=B", "B>A"],
        ["A=B", None],
    ]
    measures = rules.measures(found, case)
    measure = measures["judge/arena_hard/hard_prompt/win_rate"]
    assert measure["value"] == pytest.approx((6 * 1 + 0.5 + 0) / 8) and measure["n"] == 2
    assert measures["judge/arena_hard/hard_prompt/unreadable"]["value"] == pytest.approx(1 / 3)
    assert measure["version"] == f"judge-2026-01-01, Arena-Hard, prompt {rules.label['prompt']}, against o3"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"system_prompt": "gone"}, r"system_prompt: missing\); .* copied from JUDGE_SETTINGS"),
        ({"reference": ["gpt"]}, "judging with a reference answer is not built"),
        ({"prompt_template": "{ANSWER_C}"}, "ANSWER_C"),
        ({"top_p": 0.5}, "top_p: not read"),
    ],
)
def test_a_config_that_is_not_arena_hard_s_is_refused(tmp_path, changes, problem):
    with pytest.raises(UserError, match=problem):
        protocols.choose(config(tmp_path / "arena.yaml", **changes), None, None)


def test_the_rating_that_mt_bench_counts():
    said = {"Rating: [[5]]": 5, "[[7.5]] or [[2]]": 7.5, "I give [8]": 8, "[3], so [[4]]": 4, "ten": -1}
    assert {text: mt_bench.rating(text) for text in said} == said


def test_mt_bench_grades_each_turn_alone_and_beside_references(tmp_path):
    """Answers are their own ratings; a math answer gets one point less, to show that its reference was there."""

    def judge(asked):
        assert asked["max_tokens"] == 2048 and asked["messages"][0] == {"role": "system", "content": "You help."}
        question, answer, *reference = sections(asked)
        score = f"[[{float(answer) - bool(reference)}]]" if answer != "0" else "none"
        return (question, answer, *reference), score, None

    prompts = [Prompt(1, ["a", "b"], "writing"), Prompt(2, ["c", "d"], "math"), Prompt(3, ["e"], "stem")]
    case = Case(prompts, [["6", "8"], ["5", "10"], ["0"]], [], "S")
    file, references = judge_prompts(tmp_path / "judge_prompts.jsonl"), tmp_path / "gpt-4.jsonl"
    rules = protocols.choose(file, reference_answers(references, ["r1", "r2"]), None)
    with serving(judge) as server:
        found = verdicts(rules, case, server, tmp_path)
        assert set(server.requests) == {("a", "6"), ("ab", "8"), ("c", "5", "r1"), ("cd", "10", "r1r2"), ("e", "0")}
    assert [(row["question_id"], row["turn"], row["score"]) for row in found] == [
        *[(1, 1, 6), (1, 2, 8), (2, 1, 4), (2, 2, 9)],
        (3, 1, -1),
    ]
    values = {name: measure["value"] for name, measure in rules.measures(found, case).items()}
    assert values == {
        "judge/mt_bench/score": (6 + 8 + 4 + 9) / 4,
        "judge/mt_bench/turn_1": 5.0,
        "judge/mt_bench/turn_2": 8.5,
        "judge/mt_bench/unreadable": 0.2,
    }
    with pytest.raises(UserError, match="set evaluate.judge.references to FastChat's"):
        protocols.choose(file, None, None).check(prompts)
    with pytest.raises(UserError, match="no reference answer to the second turn of prompt 2"):
        protocols.choose(file, reference_answers(references, ["r1"]), None).check(prompts)
    with pytest.raises(UserError, match="reads no evaluate.judge.opponent"):
        protocols.choose(file, None, "gpt.json")
    with pytest.raises(UserError, match=r"is not FastChat's judge_prompts.jsonl .*output_format of single-v1"):
        protocols.choose(judge_prompts(tmp_path / "other.jsonl", output_format="[[A]]"), None, None)


def test_answers_of_other_models_are_read_from_the_files_of_benchmarks(tmp_path):
    rows = {
        "alpaca": [{"instruction": "ask", "output": "said", "generator": "m"}],
        "mt": [{"question_id": 7, "model_id": "m", "choices": [{"index": 0, "turns": ["said"]}]}],
        "arena": [{"uid": 7, "model": "m", "messages": [{"role": "assistant", "content": {"answer": "said"}}]}],
    }
    for name, written in rows.items():
        file = lines(tmp_path / f"{name}.jsonl", written)
        assert answer_files.read(file, [Prompt(7, ["ask"], "d")]) == ("m", [["said"]])
        with pytest.raises(UserError, match="has no answer to 1 of 2 prompts, such as 8"):
            answer_files.read(file, [Prompt(7, ["ask"], "d"), Prompt(8, ["more"], "d")])
        with pytest.raises(UserError, match="two answers to"):
            answer_files.read(lines(tmp_path / f"{name}.jsonl", written * 2), [])
    with pytest.raises(UserError, match="is no file of one model's answers .*KeyError"):
        answer_files.read(lines(tmp_path / "bad.jsonl", [{"prompt": "ask"}]), [])
