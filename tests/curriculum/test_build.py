"""Chunks by score, end to end: what is computed, written and printed."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import compose
from toys import prepare
from transformers import AutoModelForCausalLM

from sdpo.curriculum import build, diagnostics, score_inputs
from sdpo.errors import UserError
from sdpo.model.logprobs import naive_logprobs
from sdpo.stats import as_measure, wilson
from sdpo.store.artifacts import Store
from sdpo.train import setup

EASY = ["split=easy_to_hard", "split.level=pair", "split.num_chunks=3"]


def read(folder):
    return json.loads((folder / "split.json").read_text()), pd.read_parquet(folder / "pairs.parquet").set_index("id")


def keys(folder):
    return [step["key"] for step in json.loads((folder / "manifest.json").read_text())["steps"]]


def naive_gamma(folder, rows):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return [float(both.chosen - both.rejected) for both in (naive_logprobs(model, row) for row in rows)]


def test_sources_go_from_easy_to_hard_and_split_json_says_why(run, toy, tmp_path, capsys):
    folder = run("split=easy_to_hard")
    split, pairs = read(folder)
    trained = pairs[~pairs["held_out"]]
    accuracy = {source: as_measure(wilson(group["score"].to_numpy())) for source, group in trained.groupby("source")}
    assert {source: by_score["score"] for source, by_score in split["sources"].items()} == accuracy
    first = [pairs.loc[ids[0], "source"] for ids in split["chunks"]]
    assert [accuracy[source]["value"] for source in first] == sorted(
        (interval["value"] for interval in accuracy.values()), reverse=True
    )
    model_key = json.loads((folder / "manifest.json").read_text())["model_key"]
    score = {"name": "gamma", "model": "initial", "weights": [model_key]}
    assert {name: split["score"][name] for name in score} == score and split["score"]["tokens"] > 1000
    assert split["dropped"] == [] and [receipt["num_pairs"] for receipt in split["receipts"]] == [
        len(ids) for ids in split["chunks"]
    ]
    assert split["warnings"]  # 22 pairs a source under random weights tell nothing apart
    printed = capsys.readouterr().err
    assert [printed.count(f"warning: {warning}\n") for warning in split["warnings"]] == [1] * len(split["warnings"])

    assert pairs["score"][pairs["held_out"]].isna().all()
    _, inputs = prepare(toy, tmp_path / "other")
    rows = [row for row in inputs.train.rows if row.id in trained.index][:5]
    expected = naive_gamma(toy / "model", rows)
    assert trained.loc[[row.id for row in rows], "score"].tolist() == pytest.approx(expected, abs=1e-3)


def test_a_replayed_split_is_the_same_run(run, tmp_path):
    first = run(*EASY, "split.keep=0.5", name="first")
    split, _ = read(first)
    assert (sum(map(len, split["chunks"])), len(split["dropped"])) == (33, 32)
    again = run("split=replay", f"split.path={first / 'split.json'}", name="again")
    replayed, pairs = read(again)
    assert keys(again) == keys(first)
    assert (replayed["chunks"], replayed["dropped"]) == (split["chunks"], split["dropped"])
    assert replayed["score"] is None and pairs["score"].isna().all()


def test_a_split_without_scores_computes_none(run, monkeypatch):
    monkeypatch.setattr(score_inputs, "scores", lambda *_: pytest.fail("scored"))
    monkeypatch.setattr(diagnostics, "accuracies", lambda *_: pytest.fail("measured"))
    split, _ = read(run("split=all_at_once"))
    assert (split["score"], split["sources"], split["warnings"]) == (None, {}, [])
    assert split["receipts"][0]["mean_score"] is None


def test_the_remaining_pairs_are_scored_again_by_the_newest_model(run, toy, tmp_path, capsys):
    folder = run(*EASY, "split.keep=0.5", "score.model=current", "optim.epochs=2")
    split, pairs = read(folder)
    printed = capsys.readouterr().err
    assert printed.count("score.model=current scores the remaining pairs before each of 3 steps: about") == 1
    assert len(split["score"]["weights"]) == 3

    _, inputs = prepare(toy, tmp_path / "other")
    chunk = {t: pairs[pairs["chunk"] == t] for t in (1, 2, 3)}

    def gammas(folder, ids):
        return naive_gamma(folder, [row for row in inputs.train.rows if row.id in set(ids)])

    kept = pairs.index[~pairs["held_out"]]
    assert (len(kept), len(split["dropped"])) == (33, 32)  # S's scores drop the hardest half, once
    assert min(gammas(toy / "model", kept)) > max(gammas(toy / "model", split["dropped"]))
    second = gammas(folder / "steps" / "1", chunk[2].index)
    assert sorted(chunk[2]["score"]) == pytest.approx(sorted(second), abs=1e-3)
    assert min(second) > max(gammas(folder / "steps" / "1", chunk[3].index))  # chunk 2 is easier


def test_a_score_that_reads_no_model(toy, tmp_path):
    settings, inputs = prepare(toy, tmp_path, *EASY, "score=length_gap")
    curriculum = build.build(inputs, settings, inputs.initial)
    gap = np.array([len(row.rejected) - len(row.chosen) for row in inputs.train.rows])
    assert min(gap[curriculum.chunks[0]]) >= max(gap[curriculum.chunks[2]])
    split = curriculum.describe()
    assert split["score"] == {"name": "length_gap", "model": None, "weights": [], "tokens": None}
    assert (curriculum.score_N == gap).all()
    with pytest.raises(UserError, match="needs chosen_rating and rejected_rating"):
        settings = compose("model=local", "model.path=m", "data=local", "data.train=[a]", *EASY, "score=rating_gap")
        build.build(inputs, settings, inputs.initial)


def test_a_column_of_a_file_orders_pairs(toy, tmp_path):
    split = ["split=easy_to_hard", "split.level=pair", "split.num_chunks=2", "score=column"]
    settings, inputs = prepare(toy, tmp_path, *split, f"score.file={tmp_path / 'scores.csv'}")
    hardest_first = inputs.train.ids[::-1]
    lines = [f"{id},{number}" for number, id in enumerate(hardest_first)]
    (tmp_path / "scores.csv").write_text("\n".join(["id,pair_score", *lines]))
    easy, hard = build.build(inputs, settings, inputs.initial).chunks
    half = len(easy)
    assert half + len(hard) == len(hardest_first) and abs(half - len(hard)) <= 1
    assert (easy.tolist(), hard.tolist()) == ([*range(half)], [*range(half, len(hardest_first))])


def test_three_real_sources_by_a_real_model(real_data, tmp_path):
    names = ["step3_hh_helpful", "step1_easy", "step2_ultrafeedback"]
    for name in names:
        lines = (real_data / "pairs" / f"{name}.train.jsonl").read_text().splitlines()
        (tmp_path / f"{name}.jsonl").write_text("\n".join(sorted(lines, key=len)[:60]))
    model, files = real_data / "model" / "stories260K", ",".join(str(tmp_path / f"{name}.jsonl") for name in names)
    base = ["model=local", f"model.path={model}", "data=local", f"data.train=[{files}]", "data.template=plain"]
    settings = compose(*base, "split=easy_to_hard")
    inputs = setup.prepare(settings, Store(tmp_path / "store"))
    curriculum = build.build(inputs, settings, inputs.initial)
    split, order = curriculum.describe(), [inputs.train.sources[chunk[0]] for chunk in curriculum.chunks]
    accuracy = [split["sources"][source]["score"]["value"] for source in order]
    assert sorted(order) == sorted(names) and accuracy == sorted(accuracy, reverse=True)
    for by_score in split["sources"].values():
        assert set(by_score) == {"score", "score_mean", "gamma", "gamma_per_token", "shorter", "random_model"}
        assert by_score["score"] == by_score["gamma"] and by_score["gamma"]["n"] > 50
        # Summed log-probs mostly measure length, so gamma agrees with "shorter is better".
        assert by_score["gamma"]["value"] == pytest.approx(by_score["shorter"]["value"], abs=0.1)
    assert any("is also the order by length alone" in warning for warning in split["warnings"])
