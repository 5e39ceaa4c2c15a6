"""Every place that shows the numbers of a sweep shows exactly the numbers in metrics.jsonl."""

import json
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import compose
from nbclient import NotebookClient
from test_notebooks import NOTEBOOKS

from analysis import collect, equal_kl, figures, from_wandb, report, tables

ARMS = {"plain": ["split=all_at_once", "reference=initial"], "stepwise": ["split=by_source"]}
BASE = ["experiment=smoke", "record=wandb", "optim.lr=3e-3", "optim.pairs_per_update=16"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two arms with one seed on a tiny laboratory, mirrored to W&B's offline files."""
    from sdpo import stepwise
    from sdpo.run import folder as run_folder

    folder = tmp_path_factory.mktemp("out") / "walk"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDPO_STORE", str(folder.parent / "store"))
        for arm, overrides in ARMS.items():
            settings = compose(*BASE, *overrides)
            chosen = {"reference": settings.reference["name"], "loss": "dpo"}
            run_folder.Run(settings, folder / arm, chosen, arm, sweep="walk").prepare()
            stepwise.run(settings, folder / arm)
            run_folder.finish(folder / arm, run_folder.stamp(settings))
    sweep = {
        "name": "walk",
        "command": ["train.py"],
        "runs": list(ARMS),
        "contrasts": {"reference": ["stepwise", "plain"]},
    }
    (folder / "sweep.json").write_text(json.dumps(sweep))
    return folder


def test_every_place_shows_the_same_numbers(sweep, tmp_path):
    for arm in ARMS:
        lines = [json.loads(line) for line in (sweep / arm / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((sweep / arm / "summary.json").read_text())
        check_summary(summary, lines)
        check_mirror(sweep / arm, lines, summary, tmp_path)
        check_tables_and_figures(sweep / arm, arm, lines)
    check_pages(sweep)


def check_summary(summary, lines):
    steps = [line for line in lines if line["kind"] == "step"]
    evals = [line["eval"] for line in lines if line["kind"] == "eval"]
    assert summary["initial"]["eval"] == evals[0]
    assert [step | {"kind": "step"} for step in summary["steps"]] == [
        step | {"eval": found} for step, found in zip(steps, evals[1:], strict=True)
    ]
    assert summary["headline"]["value"] == evals[-1]["lab/gold"]["value"]


def check_mirror(folder, lines, summary, out):
    """W&B's offline file holds the same numbers as the run folder, and gives the same tables."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    run = from_wandb.offline(path)
    assert list(from_wandb.entries(run.rows)) == lines
    again = from_wandb.write(run, out)
    for name in ("manifest", "summary"):
        assert json.loads((again / f"{name}.json").read_text()) == json.loads((folder / f"{name}.json").read_text())
    for read in (collect.runs, collect.steps, collect.measures, collect.train):
        check_same_table(read(folder), read(again))


def check_same_table(ours, theirs):
    """The tables are equal except for the order of measures, which W&B does not keep."""
    keys = ["run", *(name for name in ("t", "measure", "update") if name in ours)]
    ours, theirs = (table.drop(columns="folder", errors="ignore").set_index(keys) for table in (ours, theirs))
    pd.testing.assert_frame_equal(ours, theirs, check_like=True, check_exact=True)


def check_tables_and_figures(folder, arm, lines):
    evals = {line["t"]: line["eval"] for line in lines if line["kind"] == "eval"}
    updates = [line for line in lines if line["kind"] == "train"]
    last = evals[max(evals)]
    row = tables.arms(folder).set_index("arm").loc[arm]
    for name, title in tables.COMPANIONS.items():
        if name in last:
            assert tuple(row[title])[:3] == tuple(last[name][part] for part in ("value", "low", "high")), name
    curve = [line for line in figures.loss_curves(collect.train(folder)).axes[0].lines if line.get_linewidth() > 1]
    assert np.concatenate([line.get_ydata() for line in curve]).tolist() == [update["loss"] for update in updates]
    measures = collect.measures(folder)
    drawn = {line.get_label(): line for line in figures.frontier(measures).axes[0].lines}
    for axis, name in ((drawn[arm].get_xdata(), "lab/kl"), (drawn[arm].get_ydata(), "lab/gold")):
        assert axis.tolist() == [evals[t][name]["value"] for t in sorted(evals)]
    best = [evals[0][f"lab/best_of/{n}"]["value"] for n in (1, 2, 4, 8, 16, 32, 64)]
    assert drawn["best of n from S, by gold"].get_ydata().tolist() == best


def check_pages(sweep):
    """The report and a notebook show the strings of the tables."""
    shown = [tables.show(table(sweep)) for table in (tables.arms, tables.contrasts, tables.steps, equal_kl.above_plain)]
    html = report.write_report(sweep).read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDPO_RUNS", str(sweep))
        notebook = nbformat.read(NOTEBOOKS[-1], as_version=4)
        place = {"metadata": {"path": str(NOTEBOOKS[-1].parent)}}
        NotebookClient(notebook, timeout=100, resources=place).execute()
    cells = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("data", {}).get("text/html", "") for output in cells)
    for strings in (string for table in shown for string in table.to_numpy().flatten()):
        assert f">{strings}</td>" in html and f"<td>{strings}</td>" in printed.replace("&lt;", "<")


def test_best_of_n_is_measured_once_for_all_that_start_from_one_model(sweep):
    kept = [json.loads(path.read_text()) for path in (sweep.parent / "store" / "evaluation").glob("*/manifest.json")]
    assert [artifact["suite"] for artifact in kept].count("best_of_n") == 1
    found = collect.measures(sweep).query("measure == 'lab/best_of/64'")
    assert found["t"].tolist() == [0, 0] and found["value"].nunique() == 1


def test_projects_online_are_read_like_offline_files(sweep, tmp_path, monkeypatch):
    import wandb

    (path,) = (sweep / "stepwise").glob("wandb/offline-run-*/*.wandb")
    held = from_wandb.offline(path)
    rows = [dict.fromkeys(("train/loss", "eval/lab/gold")) | row for row in held.rows]  # None: undefined
    run = SimpleNamespace(
        name=held.name, config=held.config, summary=held.summary, state="finished", scan_history=lambda: iter(rows)
    )
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(runs={"team/sdpo": [run]}.get))
    (found,) = from_wandb.online("team/sdpo")
    assert from_wandb.write(found, tmp_path) == tmp_path / "walk" / "stepwise"
    check_same_table(collect.measures(tmp_path / "walk"), collect.measures(sweep / "stepwise"))
