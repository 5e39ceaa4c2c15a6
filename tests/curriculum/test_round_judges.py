"""On-policy rounds that a language model judges, behind a real local server."""

import json
from types import SimpleNamespace

import pytest
from conftest import compose
from judge_server import KEY, sections, serving

from sdpo.curriculum import round_judges
from sdpo.data.preferences import Pair
from sdpo.errors import UserError
from sdpo.store.artifacts import Store
from sdpo.validate import check


def judged_by(server, *overrides):
    settings = [f"rounds.endpoint.url={server.url}", "rounds.endpoint.model_name=judge", "rounds.endpoint.price_in=10"]
    settings += ["rounds.endpoint.price_out=30", "rounds.endpoint.max_cost=9", "rounds.endpoint.key_variable=JUDGE_KEY"]
    return ["rounds=on_policy_judge", *settings, *overrides]


def turn(role, content):
    return {"role": role, "content": content}


def test_rewards_are_win_rates_against_the_other_answers(tmp_path, monkeypatch, capsys):
    """A "good" answer wins, others tie; what is equal is not asked, and what the judge does not state is a tie."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    pairs = [
        Pair("1", "a", (turn("user", "one?"),), "", ""),
        Pair("2", "a", (turn("user", "why?"), turn("assistant", "so."), turn("user", "two?")), "", ""),
        Pair("3", "a", (turn("user", "three?"),), "", ""),
    ]
    texts = [["good", "bad", "worse"], ["same", "good", "same"], ["good", "bad", "bad"]]
    answers = [[{"text": text} for text in of] for of in texts]
    with serving(**{"three?": ["mute"] * 2}) as server:
        rounds = compose("model=lab", "data=lab", *judged_by(server, "rounds.answers=3")).rounds
        runner = SimpleNamespace(store=Store(tmp_path))
        found = round_judges.rewards(rounds, pairs, answers, runner)
        num_asked = len(server.asked)
        assert (round_judges.rewards(rounds, pairs, answers, runner) == found).all()
    assert found.tolist() == [[1, 0.25, 0.25], [0.25, 1, 0.25], [0.5, 0.5, 0.5]]
    assert num_asked == len(server.asked) == 2 * (3 + 1 + 1)  # the second time nothing
    assert "user: why?\n\nassistant: so.\n\nuser: two?" in {sections(asked)[0] for asked in server.asked}
    assert "judge stated no verdict in 4 of 14 replies, which count as ties" in capsys.readouterr().err
    assert server.keys == {f"Bearer {KEY}"}


def test_a_run_trains_on_what_the_judge_prefers(run, monkeypatch, tmp_path):
    monkeypatch.setenv("JUDGE_KEY", KEY)

    def later_in_the_alphabet(asked):
        question, a, b = sections(asked)
        return (question, a, b), "[[A]]" if a > b else "[[B]]", None

    with serving(later_in_the_alphabet) as server:
        changes = ["rounds.answers=2", "rounds.max_new_tokens=5", "rounds.share=0.3", "evaluate=[]"]
        folder = run(*judged_by(server, *changes, "split=random", "split.num_chunks=2"))
        num_asked = len(server.asked)
        run(*judged_by(server, *changes, "split=random", "split.num_chunks=2"), name="again")
        assert 0 < num_asked == len(server.asked)
    decided = [both for t in (1, 2) for both in json.loads((folder / "rounds" / f"{t}.json").read_text()) if both]
    assert {tuple(both["rewards"]) for both in decided} == {(1.0, 0.0)}
    assert all(both["best"]["text"].strip() > both["worst"]["text"].strip() for both in decided)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


@pytest.mark.parametrize("overrides", [["rounds=on_policy_lab", "rounds.judge=endpoint"], ["rounds.judge=gold"]])
def test_an_endpoint_without_its_settings_or_the_other_way_round(overrides):
    chosen = judged_by(SimpleNamespace(url="http://x/v1")) if len(overrides) == 1 else []
    with pytest.raises(UserError, match="rounds.judge=endpoint and the settings of rounds.endpoint go together"):
        check(compose("model=lab", "data=lab", *chosen, *overrides))
