"""One small result file of each benchmark gives the rows that are computed by hand."""

import json

import pytest
from conftest import read_lines
from scipy import stats

from analysis import tables
from sdpo import config
from sdpo.errors import UserError
from sdpo.evals import result_files
from sdpo.run import folder as run_folder


def lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def values(measures):
    return {name: measure["value"] for name, measure in measures.items()}


def test_annotations_of_alpaca_eval(tmp_path):
    """2 is a win, 1 a loss, 0 and 1.5 are draws, 1.75 is three quarters of a win, null is no verdict."""
    rows = [
        {"generator_1": "gpt4", "generator_2": "run-M_1", "preference": preference}
        for preference in (2, 1, 0, 1.5, None, 1.75)
    ]
    (tmp_path / "annotations.json").write_text(json.dumps(rows))
    found = result_files.read([str(tmp_path / "annotations.json")])
    assert values(found["run-M_1"]) == {
        "alpaca_eval/win_rate": pytest.approx(2.75 / 5),
        "alpaca_eval/unreadable": 1 / 6,
    }
    assert found["run-M_1"]["alpaca_eval/win_rate"]["n"] == 5


def test_the_leaderboard_of_alpaca_eval(tmp_path):
    (tmp_path / "leaderboard.csv").write_text(
        ",win_rate,standard_error,n_wins,n_wins_base,n_draws,n_total,length_controlled_winrate,lc_standard_error\n"
        "run-M_1,20.0,1.5,150,650,5,805,25.0,0.5\nrun-M_2,30.0,1.5,230,570,5,805,,\n"
    )
    found = result_files.read([str(tmp_path / "leaderboard.csv")])
    assert values(found["run-M_1"]) == {"alpaca_eval/win_rate": 0.2, "alpaca_eval/length_controlled": 0.25}
    half = stats.t.ppf(0.975, 804) * 0.005
    assert found["run-M_1"]["alpaca_eval/length_controlled"]["high"] == pytest.approx(0.25 + half)
    assert values(found["run-M_2"]) == {"alpaca_eval/win_rate": 0.3}


def test_judgments_of_arena_hard(tmp_path):
    """The baseline is A in the first game. Strong verdicts count three times: 0 of 4, 4 of 4 and 1.5 of 2."""
    games = [("A>>B", "B>A"), ("B>A", "A>>B"), ("A=B", "A>B"), (None, "A>B")]
    rows = [
        {"question_id": i, "model": "run-M_1", "judge": "gpt-4", "games": [{"score": score} for score in scores]}
        for i, scores in enumerate(games)
    ]
    other = {"uid": "u", "category": "hard_prompt", "model": "run-M_2", "games": [{"score": "B>>A"}, {"score": "B>A"}]}
    found = result_files.read([lines(tmp_path / "m.jsonl", rows), lines(tmp_path / "v2.jsonl", [other])])
    measure = found["run-M_1"]["arena_hard/win_rate"]
    assert measure["value"] == pytest.approx(5.5 / 10) and measure["n"] == 3
    error = ((2.2**2 + 1.8**2 + 0.4**2) * 3 / 2) ** 0.5 / 10
    assert measure["high"] == pytest.approx(0.55 + stats.t.ppf(0.975, 2) * error)
    assert found["run-M_1"]["arena_hard/unreadable"]["value"] == 1 / 4
    assert values(found["run-M_2"]) == {
        "arena_hard/hard_prompt/win_rate": 3 / 4,
        "arena_hard/hard_prompt/unreadable": 0.0,
    }


def mt_bench(model, scores):
    return [
        {"question_id": question, "model": model, "judge": ["gpt-4", "single-v1"], "score": score, "turn": turn}
        for (question, turn), score in scores.items()
    ]


def test_judgments_of_mt_bench(tmp_path):
    rows = mt_bench("run-M_1", {(81, 1): 8, (81, 2): 6, (82, 1): 10, (82, 2): -1})
    found = result_files.read([lines(tmp_path / "gpt-4_single.jsonl", rows)])["run-M_1"]
    assert values(found) == {
        "mt_bench/score": 8.0,
        "mt_bench/turn_1": 9.0,
        "mt_bench/turn_2": 6.0,
        "mt_bench/unreadable": 1 / 4,
    }
    assert (found["mt_bench/score"]["n"], found["mt_bench/turn_2"]["n"]) == (2, 1)


def test_what_cannot_be_read_is_one_sentence(tmp_path):
    pair = {"question_id": 1, "model_1": "a", "model_2": "b", "g1_winner": "a", "g2_winner": "a"}
    for rows in ([pair], [{"question_id": 1, "model": "a", "games": [{"score": "A>C"}, {"score": "A>B"}]}], [["a"]]):
        with pytest.raises(UserError, match=r"bad.jsonl: is no result file of AlpacaEval, Arena-Hard or MT-Bench"):
            result_files.read([lines(tmp_path / "bad.jsonl", rows)])
    twice = [lines(tmp_path / f"{name}.jsonl", mt_bench("run-M_1", {(81, 1): 8})) for name in "ab"]
    with pytest.raises(UserError, match="b.jsonl: another file gives mt_bench/score of run-M_1 too"):
        result_files.read(twice)


def test_a_run_logs_what_was_found_for_its_models(run, tmp_path):
    rows = [row for t in (0, 1) for row in mt_bench(f"first-M_{t}", {(81, 1): 4 + t, (81, 2): 6 + t})]
    file = lines(tmp_path / "gpt-4_single.jsonl", rows)
    settings = [
        "evaluate=[results,preference]",
        f"evaluate.results.files=[{file}]",
        "split=all_at_once",
        "reference=initial",
    ]
    folder = run(*settings, "evaluate.results.run=first")
    found = [entry["eval"] for entry in read_lines(folder, "eval")]
    assert [measures["mt_bench/score"]["value"] for measures in found] == [5.0, 6.0]
    run_folder.finish(folder, run_folder.stamp(config.load(folder / "config.yaml")))
    assert [cell.value for cell in tables.arms(folder)["MT-Bench"]] == [5.0, 6.0]  # S and the run's only arm
    with pytest.raises(UserError, match=r"have no model other-M_0, other-M_1, ...; they have first-M_0, first-M_1"):
        run(*settings, "evaluate.results.run=other", name="second")
