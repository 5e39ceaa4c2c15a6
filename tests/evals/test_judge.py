"""A judge behind an endpoint, against a local server with faults: rates, resumption, bound, no trace of the key."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
from conftest import CHECKOUT, read_lines
from judge_server import KEY, alpaca_judge, endpoint, serving

from sdpo.data.prompts import Prompt
from sdpo.errors import UserError
from sdpo.evals.judge import chat_endpoint, pairwise
from sdpo.evals.judge.case import Case
from sdpo.evals.judge.pairwise import Judgement
from sdpo.stats import length_controlled
from sdpo.store.artifacts import Store


def compare(end, questions, folder, ours="good", theirs="poor"):
    prompts = [Prompt(i, [question], "asked") for i, question in enumerate(questions)]
    return pairwise.compare(end, prompts, [ours] * len(prompts), [theirs] * len(prompts), Store(folder))


def test_rates_by_hand():
    given = [(1.0, 1.0), (1.0, 0.0), (0.5, 1.0), (None, 1.0)]
    judgements = [Judgement(i, *verdicts, "v1") for i, verdicts in enumerate(given)]
    found = pairwise.rates("judge", judgements, np.array([4.0, -2.0, 0.0, 9.0]))
    values = {name: measure["value"] for name, measure in found.items()}
    assert values["judge"] == pytest.approx((1 + 0.5 + 0.75) / 3) and found["judge"]["n"] == 3
    assert values["judge/orders_agree"] == pytest.approx(1 / 3)
    assert values["judge/first_preferred"] == pytest.approx((0.5 + 1 + 0.25) / 3)
    assert values["judge/unreadable"] == 1 / 8 and values["judge/longer"] == 11 / 4
    expected = length_controlled(np.array([1.0, 0.5, 0.75]), np.array([4.0, -2.0, 0.0]))
    assert found["judge/length_controlled"]["value"] == expected["value"]
    equal = pairwise.rates("judge", judgements, np.zeros(4))["judge/length_controlled"]["value"]
    assert equal == pytest.approx(0.75, abs=0.01)  # answers of equal length: the plain rate, but for the prior
    assert found["judge"]["version"] == f"v1, prompt {pairwise.PROMPT_HASH}"
    assert {measure["value"] for measure in pairwise.rates("judge", [], np.array([])).values()} == {None}
    prompts = [Prompt(i, ["q"], "asked") for i in range(4)]
    case = Case(prompts, [["longer"]] * 4, ["short"] * 4, "gpt")
    against = pairwise.Own().measures(judgements, case)
    assert against["judge"]["value"] == found["judge"]["value"] and against["judge/longer"]["value"] == 1
    assert against["judge"]["version"] == f"v1, prompt {pairwise.PROMPT_HASH}, against gpt"


def test_the_last_verdict_of_a_reply_counts():
    assert [pairwise.win_of_a(text) for text in ("[[B]] ... no: [[A]]", "[[C]]", "A is better", "[[D]]")] == [
        1,
        0.5,
        None,
        None,
    ]


def test_faults_are_overcome_and_every_verdict_is_right(tmp_path):
    kinds = {"q0": [429], "q1": [500, 503], "q2": ["cut"], "q3": ["halved"], "q4": ["prose"], "q5": ["empty", 429]}
    questions = [f"q{i}" for i in range(8)]
    with serving(**kinds, q6=["slow"]) as server:
        judgements = compare(endpoint(server), questions, tmp_path)
        assert [(j.first, j.second) for j in judgements] == [(1, 1)] * 8
        assert server.most_held <= 3
        attempts = Counter()
        for (question, *_), count in server.requests.items():
            attempts[question] += count
        assert attempts == {"q0": 3, "q1": 4, "q2": 3, "q3": 3, "q4": 3, "q5": 4, "q6": 3, "q7": 2}
        server.requests.clear()
        assert compare(endpoint(server), questions, tmp_path) == judgements
        assert not server.requests
    (ledger,) = (tmp_path / "replies").iterdir()
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert len(lines) == 16
    assert {(line["judge"], line["version"], line["prompt"]) for line in lines} == {
        ("judge", "judge-2026-01-01", pairwise.PROMPT_HASH)
    }
    reply = (1000 * 10 + 100 * 30) / 1e6
    assert sorted(line["cost"] for line in lines)[:10] == pytest.approx([reply] * 10)  # what got lost may be billed too
    assert sum(line["cost"] > reply * 1.01 for line in lines) == 5  # cut, halved, prose, empty, slow


@pytest.mark.parametrize("kind", ["mute", "null"])
def test_a_judge_without_a_verdict_is_counted(tmp_path, kind):
    with serving(odd=[kind]) as server:
        (judgement,) = compare(endpoint(server, concurrency=1), ["odd"], tmp_path)
    assert (judgement.first, judgement.second) == (None, 1.0) and server.requests.total() == 2
    assert pairwise.rates("judge", [judgement], np.zeros(1))["judge/unreadable"]["value"] == 0.5


def test_refusals_are_one_sentence_without_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(locked=[401] * 9, odd=["prose"] * 9) as server:
        with pytest.raises(UserError, match=r"answers 401 to judge with the key in JUDGE_KEY \(.*\*\*\*") as refused:
            compare(endpoint(server), ["locked"], tmp_path)
        assert KEY not in str(refused.value) and server.keys == {f"Bearer {KEY}"}
        with pytest.raises(UserError, match="does not answer as chat completions do"):
            compare(endpoint(server, concurrency=1), ["odd"], tmp_path)
    began = time.monotonic()
    with pytest.raises(UserError, match="cannot be reached .*refused"):
        compare(endpoint(server), ["gone"], tmp_path)
    assert time.monotonic() - began < 2  # without the retries of one that was there, which take minutes


def test_a_judge_that_goes_away_is_waited_for_and_then_named(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_endpoint, "RETRIES", 1)
    with serving(gone=["cut", "cut"]) as server, pytest.raises(UserError, match="cannot be reached"):
        compare(endpoint(server, concurrency=1), ["gone"], tmp_path)
    assert server.requests.total() >= 2  # and the other order, which was under way


def test_spending_stops_at_its_bound_and_goes_on_from_there(tmp_path, capsys):
    questions = [f"q{i}" for i in range(5)]
    with serving() as server:
        reply = (1000 * 10 + 100 * 30) / 1e6  # 1.3 cents
        with pytest.raises(UserError, match=r"^\$0\.039 is spent, and one more reply may exceed max_cost=0.045: raise"):
            compare(endpoint(server, concurrency=1, max_cost=0.045), questions, tmp_path)
        assert sum(server.requests.values()) == 3 and 3 * reply < 0.045 < 4 * reply
        assert "judge: 10 replies of 10 are asked for, about $" in capsys.readouterr().err
        with pytest.raises(UserError, match="may exceed"):  # also in another process: what was spent is in the store
            compare(endpoint(server, concurrency=1, max_cost=0.045), questions, tmp_path)
        compare(endpoint(server), questions, tmp_path)
        assert set(server.requests.values()) == {1} and len(server.requests) == 10
        assert "judge: 7 replies of 10 are asked for, about $" in capsys.readouterr().err


def test_processes_that_share_a_store_share_the_bound(tmp_path):
    """Two at once, with different questions: together they spend no more than one of them may."""
    stopped = []

    def ask(questions):
        try:
            compare(endpoint(server, max_cost=0.16), questions, tmp_path)  # 12 replies
        except UserError as error:
            stopped.append(str(error))

    with serving() as server:
        threads = [threading.Thread(target=ask, args=([f"{name}{i}" for i in range(5)],)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 10 <= sum(server.requests.values()) <= 12 and len(stopped) == 1


def test_a_proxy_of_the_environment_is_used(tmp_path, monkeypatch):
    with serving() as server:
        monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        (judgement,) = compare(endpoint(server, url="http://judge.invalid/v1"), ["q"], tmp_path)
        assert judgement.first == 1.0 and sum(server.requests.values()) == 2


KILLED = """
import sys
from pathlib import Path
from sdpo.evals.judge.chat_endpoint import Endpoint, ask
from sdpo.store.artifacts import Store

end = Endpoint(sys.argv[1], "judge", "JUDGE_KEY", 100, 1, 60.0, 0.0, 0.0, 0.0)
turns = [[{"role": "user", "content": f"# Question\\n\\nq{i}\\n\\n# A\\n\\ngood\\n\\n# B\\n\\npoor"}] for i in range(8)]
print(len(ask(end, turns, {}, Store(Path(sys.argv[2])))))
"""


def test_after_a_kill_nothing_is_asked_twice(tmp_path):
    with serving(q5=["slow"] * 100) as server:
        command = [sys.executable, "-c", KILLED, server.url, str(tmp_path)]
        env = os.environ | {"PYTHONPATH": str(CHECKOUT), "JUDGE_KEY": KEY}
        process = subprocess.Popen(command, env=env)
        while server.requests["q5", "good", "poor"] == 0:  # five replies are here, and the sixth is on its way
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        (ledger,) = (tmp_path / "replies").iterdir()
        with ledger.open("a") as file:
            file.write('{"key": "half a li')  # as if it had been killed while it wrote
        server.faults.clear()
        again = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert again.stdout.split() == ["8"]
        asked = {question: count for (question, *_), count in server.requests.items()}
        assert asked == {f"q{i}": 2 if i == 5 else 1 for i in range(8)}  # the sixth was never answered
    assert len([json.loads(line) for line in ledger.read_text().splitlines()]) == 8


def test_a_stop_does_not_wait_for_the_next_request(tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a child of `nohup ... &` would ignore Ctrl-C
    with serving(q0=["busy"]) as server:
        command = [sys.executable, "-c", KILLED, server.url, str(tmp_path)]
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(CHECKOUT)}, stderr=subprocess.PIPE)
        while server.requests["q0", "good", "poor"] == 0:
            time.sleep(0.01)
        time.sleep(0.5)  # the reply, which asks for a pause of a minute, is there
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert process.returncode and said.rstrip().endswith(b"KeyboardInterrupt") and server.requests.total() == 1


def test_a_run_is_judged_and_leaves_no_trace_of_the_key(run, tmp_path, monkeypatch, capfd):
    """By our protocol against S, and by AlpacaEval's against a file, whose answers are the good ones."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    (tmp_path / "ask.txt").write_text("abc\nde\n")
    rows = [{"instruction": asked, "output": "good", "generator": "gpt"} for asked in ("de", "abc", "not asked")]
    (tmp_path / "gpt.json").write_text(json.dumps(rows))
    with serving(alpaca_judge, abc=[500]) as server:
        settings = {"file": tmp_path / "ask.txt", "url": server.url, "model_name": "judge", "key_variable": "JUDGE_KEY"}
        settings |= {"price_in": 1, "price_out": 1, "max_cost": 1, "max_new_tokens": 4}
        given = [f"evaluate.judge.{name}={value}" for name, value in settings.items()]
        settings |= {"protocol": "'alpaca_eval:weighted_alpaca_eval_gpt4_turbo'", "opponent": tmp_path / "gpt.json"}
        other = ", ".join(f"{name}: {value}" for name, value in ({"name": "judge"} | settings).items())
        given += [f"+evaluate.alpaca={{{other}}}"]
        folder = run("evaluate=[judge]", *given, "split=all_at_once", "reference=initial", "record=wandb")
        assert server.keys == {f"Bearer {KEY}"}
    start, end = (entry["eval"] for entry in read_lines(folder, "eval"))
    assert start["judge"]["value"] is None and end["judge"]["value"] == 0.5 and end["judge"]["n"] == 2
    assert end["judge"]["version"] == f"judge-2026-01-01, prompt {pairwise.PROMPT_HASH}"
    for measures in (start, end):
        assert measures["judge/alpaca_eval/win_rate"]["value"] == pytest.approx(0.1)
        assert "against gpt" in measures["judge/alpaca_eval/win_rate"]["version"]
    store = Store().root
    assert list((store / "replies").iterdir())
    made = [json.loads(manifest.read_text()) for manifest in (store / "judgements").glob("*/manifest.json")]
    assert (
        sorted((one.get("protocol"), one.get("annotator"), one.get("opponent")) for one in made if one.get("opponent"))
        == [("alpaca_eval 0.6.6", "weighted_alpaca_eval_gpt4_turbo", "gpt")] * 2
    )
    for place in (folder, store):
        held = [path for path in place.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
        assert not held
    assert KEY not in "".join(capfd.readouterr())
