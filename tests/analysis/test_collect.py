"""Tidy tables from run and sweep folders: the numbers of the files, under the documented names."""

import json

import numpy as np
import pandas as pd
import pytest
from runs import NUM_PAIRS, UPDATES, make_run, make_sweep

from analysis import collect
from sdpo.errors import UserError


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return make_sweep(tmp_path_factory.mktemp("out") / "synthetic")


def test_finds_runs_once(sweep, tmp_path):
    alone = make_run(tmp_path / "alone")
    inside = sweep / "stepwise-s0"
    assert [folder.name for folder in collect.folders(alone, inside)] == ["alone", "stepwise-s0"]
    assert len(collect.folders(sweep, inside)) == 6
    make_run(sweep / "left-by-other-settings")
    assert len(collect.folders(sweep)) == 6
    with pytest.raises(UserError, match="no run folder and holds none"):
        collect.folders(tmp_path / "nothing")


def test_runs(sweep):
    runs = collect.runs(sweep)
    assert runs["arm"].tolist() == ["all at once"] * 3 + ["stepwise"] * 3
    assert runs["headline"].tolist() == pytest.approx([0.80, 0.81, 0.82, 0.82, 0.83, 0.84])
    assert runs["choices.reference"].unique().tolist() == ["initial", "previous"]


def test_unfinished_run_is_shown_and_left_out(sweep, tmp_path):
    broken = make_run(tmp_path / "broken", arm="stepwise", seed=9)
    for name in ("done", "summary.json", "metrics.jsonl"):
        (broken / name).unlink()
    (broken / "error.txt").write_text("the loss is not finite\n\nTraceback ...\n")
    runs = collect.runs(sweep, broken)
    assert runs["done"].tolist() == [True] * 6 + [False]
    assert runs["error"].tolist()[-1] == "the loss is not finite"
    assert 9 not in collect.steps(sweep, broken)["seed"].tolist()
    with pytest.raises(UserError, match="has ended"):
        collect.steps(broken)


def test_declared(sweep):
    declared = collect.declared(sweep)
    assert declared["contrasts"] == {"order": ("stepwise", "all at once")} and len(declared["runs"]) == 6
    assert collect.declared(sweep / "stepwise-s0") == {"runs": [], "contrasts": {}}


def test_steps_name_their_reference(sweep):
    steps = collect.steps(sweep / "stepwise-s0")
    assert steps[["t", "start", "reference"]].values.tolist() == [[1, "M_0", "M_0"], [2, "M_1", "M_1"]]
    assert steps["num_pairs"].tolist() == [NUM_PAIRS, NUM_PAIRS]


def test_mixed_reference(tmp_path):
    run = make_run(tmp_path / "mixed")
    manifest = json.loads((run / "manifest.json").read_text())
    s, first = manifest["model_key"], manifest["steps"][0]["key"]
    manifest["steps"][1]["windows"][0]["weights"] = {s: 0.4, first: 0.6}
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert collect.steps(run)["reference"].tolist() == ["M_0", "0.4 M_0 + 0.6 M_1"]


def test_measures_equal_the_summary(sweep):
    """`measures` holds exactly the numbers of summary.json, and the headline is one of them."""
    for folder in collect.folders(sweep):
        summary = json.loads((folder / "summary.json").read_text())
        recorded = {0: summary["initial"]["eval"]} | {step["t"]: step["eval"] for step in summary["steps"]}
        measures = collect.measures(folder).set_index(["t", "measure"])
        assert len(measures) == sum(len(evaluation) for evaluation in recorded.values())
        for t, evaluation in recorded.items():
            for name, numbers in evaluation.items():
                found = measures.loc[(t, name), ["value", "low", "high", "n"]].tolist()
                expected = [
                    np.nan if numbers[part] is None else numbers[part] for part in ("value", "low", "high", "n")
                ]
                np.testing.assert_array_equal(found, expected)
        headline = summary["headline"]
        assert measures.loc[(summary["steps"][-1]["t"], headline["name"]), "value"] == headline["value"]


def test_sources_in_measure_names():
    assert collect._parts("preference/owner/set/gamma") == {
        "measure": "preference/owner/set/gamma",
        "source": "owner/set",
        "name": "preference/gamma",
    }
    assert collect._parts("preference/gamma")["source"] == ""
    assert collect._parts("lab/h4/reverse")["name"] == "lab/h4/reverse"


def test_updates_are_counted_over_the_run(sweep):
    train = collect.train(sweep / "stepwise-s0")
    assert train["overall_update"].tolist() == list(range(1, 2 * UPDATES + 1))


def test_trajectory_and_pairs(sweep):
    trajectory, pairs = collect.trajectory(sweep / "stepwise-s1"), collect.pairs(sweep / "stepwise-s1")
    assert (trajectory["gamma"] == trajectory["chosen_logp"] - trajectory["rejected_logp"]).all()
    assert set(trajectory["id"]) == set(pairs["id"]) and trajectory["seed"].unique().tolist() == [1]


def test_references_are_judged_on_their_own_step(sweep):
    rows = collect.references(sweep / "stepwise-s1")
    assert rows.groupby(["t", "model"]).size().to_dict() == {(1, "M_0"): NUM_PAIRS, (2, "M_1"): NUM_PAIRS}
    assert not rows["seen"].any() and not rows["held_out"].any()


def test_by_arm_keeps_the_interval_of_one_seed(sweep):
    gold = collect.measures(sweep).query("measure == 'lab/gold'")
    last = collect.by_arm(gold, ["t"]).query("arm == 'stepwise' and t == 2")
    assert last["value"].item() == pytest.approx(0.83)
    assert last["high"].item() - 0.83 == pytest.approx(4.302653 * 0.01 / 3**0.5, abs=1e-6)
    alone = collect.by_arm(gold.query("seed == 1"), ["t"]).query("arm == 'stepwise' and t == 2")
    pd.testing.assert_series_equal(
        alone[["value", "low", "high", "seeds"]].iloc[0],
        pd.Series({"value": 0.83, "low": 0.81, "high": 0.85, "seeds": 1}),
        check_names=False,
        check_dtype=False,
    )
