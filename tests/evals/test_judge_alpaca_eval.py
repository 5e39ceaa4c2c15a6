"""AlpacaEval's own prompts, order, parsing and length control, by its package, against a local endpoint."""

import json
import logging
import os
import sys

import huggingface_hub.constants
import numpy as np
import pandas as pd
import pytest
from judge_server import alpaca_judge, endpoint, serving

from sdpo.data.prompts import Prompt
from sdpo.errors import UserError
from sdpo.evals.judge import alpaca, alpaca_package, protocols
from sdpo.evals.judge.case import Case
from sdpo.evals.judge.chat_endpoint import digest
from sdpo.stats import length_controlled
from sdpo.store.artifacts import Store

WEIGHTED = "alpaca_eval:weighted_alpaca_eval_gpt4_turbo"


def case(questions, ours, theirs):
    prompts = [Prompt(i, [question], "asked") for i, question in enumerate(questions)]
    return Case(prompts, [[answer] for answer in ours], theirs, "gpt")


def judged(given, server, folder, protocol=WEIGHTED):
    """The measures of a case, and the verdicts."""
    rules = protocols.choose(protocol, None, None)
    rules.check(given.prompts)
    asking = rules.asking._asdict()
    verdicts = rules.verdicts(given, endpoint(server, **asking), Store(folder))
    return rules.measures(verdicts, given), verdicts


def test_each_prompt_is_asked_once_in_the_package_s_order_and_read_by_its_parser(tmp_path):
    """90 per cent for the good answer in whichever order, half for equal answers, which are not asked."""
    questions = [f"q{i}" for i in range(8)] + ["equal", "silent"]
    ours = ["good one", "poor"] * 4 + ["good", "poor"]
    theirs = ["poor", "good"] * 4 + ["good", "good"]
    given = case(questions, ours, theirs)
    with serving(alpaca_judge, q0=[429]) as server:
        measures, verdicts = judged(given, server, tmp_path)
        assert sorted(server.answered) == sorted(server.requests) and len(server.answered) == 9
        swapped = {
            first.startswith("good") != ours[int(question[1:])].startswith("good")
            for question, first, _ in server.answered
            if question != "silent"
        }
        assert swapped == {True, False}  # to some questions the model's answer is the first one
        asked = server.asked[0]
        assert [turn["role"] for turn in asked.pop("messages")] == ["system", "user"]
        assert asked == {"model": "judge", "temperature": 1.0, "max_tokens": 1, "logprobs": True, "top_logprobs": 5}
        server.requests.clear()
        assert judged(given, server, tmp_path) == (measures, verdicts) and not server.requests
    assert [row["preference"] for row in verdicts] == [pytest.approx(p) for p in [1.9, 1.1] * 4 + [1.5]] + [None]
    values = {name: measure["value"] for name, measure in measures.items()}
    assert values["judge/alpaca_eval/win_rate"] == pytest.approx((4 * 0.9 + 4 * 0.1 + 0.5) / 9)
    assert values["judge/alpaca_eval/unreadable"] == 0.1 and values["judge/alpaca_eval/longer"] == pytest.approx(1.6)
    controlled = measures["judge/alpaca_eval/length_controlled"]
    longer = np.array([4.0, 0.0] * 4 + [0.0])
    expected = length_controlled(np.array([0.9, 0.1] * 4 + [0.5]), longer)
    assert controlled["value"] == pytest.approx(expected["value"])
    label = protocols.choose(WEIGHTED, None, None).label
    stated = (
        f"judge-2026-01-01, alpaca_eval 0.6.6, weighted_alpaca_eval_gpt4_turbo, prompt {label['prompt']}, against gpt"
    )
    assert controlled["version"].startswith(f"{stated}, length control of sdpo")
    (ledger,) = (tmp_path / "replies").iterdir()
    assert label["protocol"] == "alpaca_eval 0.6.6" and label["annotator"] == "weighted_alpaca_eval_gpt4_turbo"
    for kept in [*map(json.loads, ledger.read_text().splitlines()), *verdicts]:
        assert kept.items() >= label.items()


def test_an_annotator_that_reads_text_needs_no_log_probs(tmp_path):
    def ranking(asked):
        assert "logprobs" not in asked and asked["max_tokens"] == 100
        text = asked["messages"][-1]["content"]
        best = "model_1" if text.index("good") < text.index("poor") else "model_2"
        worst = "model_2" if best == "model_1" else "model_1"
        return ("q",), str([{"model": best, "rank": 1}, {"model": worst, "rank": 2}]), None

    questions = [f"q{i}" for i in range(4)]
    with serving(ranking) as server:
        _, verdicts = judged(
            case(questions, ["good"] * 4, ["poor"] * 4), server, tmp_path, "alpaca_eval:alpaca_eval_gpt4"
        )
        assert [row["preference"] for row in verdicts] == [2.0] * 4
    with (
        serving(lambda asked: (("q",), "m", None)) as server,
        pytest.raises(UserError, match="gives no log-probs of judge"),
    ):
        judged(case(["q"], ["good"], ["poor"]), server, tmp_path / "other")


@pytest.fixture
def difficulties(tmp_path, monkeypatch):
    """The Hub's cache in a folder, with the difficulties of ten prompts, which count as AlpacaEval's own."""
    questions = [f"q{i}" for i in range(10)]
    repository = tmp_path / "hub" / "datasets--tatsu-lab--alpaca_eval"
    snapshot = repository / "snapshots" / ("0" * 40)
    monkeypatch.setattr(alpaca, "INSTRUCTIONS", digest(questions))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def write():
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        common = {"instruction_difficulty": np.linspace(-2, 2, 10), "not_gamed_baseline": False}
        gamed = [
            pd.DataFrame(common | {"model": name, "index": range(10), "preference": win, "std_delta_len": longer})
            for name, win, longer in (("concise", 0.2, 1.0), ("verbose", 0.8, -1.0))
        ]
        pd.concat(gamed).to_csv(snapshot / "df_gamed.csv", index=False)
        return questions

    return write


def test_alpaca_eval_s_prompts_have_the_package_s_length_control(tmp_path, difficulties):
    """The value is that of the package on annotations written by hand; without its data nothing is asked."""
    ours, theirs = ["good" + "!" * 7 * i for i in range(10)], ["poor"] * 10
    given = case([f"q{i}" for i in range(10)], ours, theirs)
    with serving(alpaca_judge) as server:
        with pytest.raises(
            UserError, match="reads df_gamed.csv of tatsu-lab/alpaca_eval on the Hub, .* run `hf download"
        ):
            judged(given, server, tmp_path)
        assert not server.requests
        difficulties()
        measures, _ = judged(given, server, tmp_path)
    rows = [
        {"generator_1": "a", "generator_2": "b", "preference": 1.9, "output_1": their, "output_2": our}
        for our, their in zip(ours, theirs, strict=True)
    ]
    with alpaca._quiet():
        found = alpaca_package.alpaca_eval().metrics.get_length_controlled_winrate(rows, save_weights_dir=None)
    controlled = measures["judge/alpaca_eval/length_controlled"]
    assert controlled["value"] == pytest.approx(found["length_controlled_winrate"] / 100)
    assert 0.5 < controlled["value"] < 0.9  # longer answers won among the models that were told to be long
    assert controlled["version"].endswith("length control of the package")
    assert measures["judge/alpaca_eval/win_rate"]["value"] == pytest.approx(0.9)


def test_the_package_is_imported_without_traces_or_named_if_it_is_missing(monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    for module in [name for name in sys.modules if name.partition(".")[0] == "alpaca_eval"]:
        monkeypatch.delitem(sys.modules, module)
    alpaca_package.alpaca_eval.cache_clear()
    before = (logging.WARNING, os.environ.get(alpaca_package.NO_SECRETS), "pkg_resources" in sys.modules)
    assert alpaca_package.alpaca_eval().__version__ == "0.6.6"
    after = (logging.getLogger().level, os.environ.get(alpaca_package.NO_SECRETS), "pkg_resources" in sys.modules)
    assert after == before
    alpaca_package.alpaca_eval.cache_clear()
    monkeypatch.setitem(sys.modules, "alpaca_eval", None)
    with pytest.raises(UserError, match=r"needs the package alpaca_eval: pip install '\.\[judge\]'"):
        protocols.choose(WEIGHTED, None, None)
    alpaca_package.alpaca_eval.cache_clear()


@pytest.mark.parametrize(
    ("protocol", "problem"),
    [
        ("alpaca_eval:nobody", "alpaca_eval 0.6.6 has no annotator 'nobody'; it has .*weighted_alpaca_eval_gpt4_turbo"),
        ("alpaca_eval:", "has no annotator ''"),
        ("alpaca_eval:claude", r"asks in a way that is not built \(.*max_tokens_to_sample\)"),
        ("alpaca_eval:alpaca_eval_gpt4_turbo_fn", r"not built \(tool_choice, tools\): use weighted_"),
        ("alpaca_eval:alpaca_farm", "not built"),
        ("theirs", "protocol=theirs is not known; it can be own, alpaca_eval:ANNOTATOR"),
    ],
)
def test_what_cannot_be_asked_is_said(protocol, problem):
    with pytest.raises(UserError, match=problem):
        protocols.choose(protocol, None, None)


def test_settings_that_a_protocol_does_not_read_are_refused(tmp_path):
    with pytest.raises(UserError, match="protocol=own reads no evaluate.judge.references"):
        protocols.choose("own", "gpt-4.jsonl", None)
