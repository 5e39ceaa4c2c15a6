"""Gain over plain DPO at equal KL, by hand: the line runs from S (KL 0, gold .69) to plain DPO (KL 1.5)."""

import json
import shutil

import pytest
from runs import make_run, make_sweep

from analysis import equal_kl, tables


def _replace(file, old, new):
    file.write_text(file.read_text().replace(old, new))


def _move(run, kl):
    """Give the last model of a run another KL to S."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    *_, last = (line for line in lines if line["kind"] == "eval")
    last["eval"]["lab/kl"]["value"] = kl
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_gain_at_equal_kl(tmp_path):
    sweep = make_sweep(tmp_path / "sweep")  # plain DPO: .80, .81, .82 by seed; stepwise .02 more
    assert equal_kl.above_plain(sweep)["gain at equal KL"][0] == pytest.approx((0.02, 0.02, 0.02, 3), abs=1e-9)
    for seed in range(3):
        _move(sweep / f"stepwise-s{seed}", 0.75)
    row = equal_kl.above_plain(sweep).iloc[0]
    # at half the KL the line stands halfway: (.69 + .80) / 2 = .745, so .82 is .075 above it; .08 and .085 next
    assert row["gain at equal KL"].value == pytest.approx(0.08)
    assert row["seeds"] == 3 and row["beyond"] == 0 and row["p"] == 0.25


def test_the_line_of_another_s_says_nothing(tmp_path):
    sweep = make_sweep(tmp_path / "sweep")
    manifest = sweep / "stepwise-s1" / "manifest.json"
    _replace(manifest, json.loads(manifest.read_text())["model_key"], "z" * 64)
    row = equal_kl.above_plain(sweep).iloc[0]
    assert row["gain at equal KL"].n == 2 and row["beyond"] == 1


def test_plain_runs_of_other_settings_are_another_line(tmp_path):
    sweep = make_sweep(tmp_path / "sweep", arms=("all at once", "stepwise", "more"), gains=(0.0, 0.02, 0.05), seeds=8)
    for seed in range(8):
        more = sweep / f"more-s{seed}"
        shutil.rmtree(more)
        make_run(more, arm="more", seed=seed, num_steps=1, gold=0.85 + 0.01 * seed, sweep="sweep")
        _replace(more / "config.yaml", "  epochs: 1\n", "  epochs: 2\n")
        _move(more, 0.75)  # on one line with the others it would lift the line there, and bend it at KL 1.5
        _move(sweep / f"stepwise-s{seed}", 0.75)
    (row,) = equal_kl.above_plain(sweep).itertuples()
    assert row.arm == "stepwise" and row[2].value == pytest.approx(0.0925)  # the means: .855 - (.69 + .835) / 2
    shown = tables.contrasts(sweep).set_index("of").loc["strength"]  # of two arms of plain DPO
    assert shown["at equal KL"] is None and shown["verdict"] == "higher"


def test_no_line_beyond_plain_dpo(tmp_path):
    sweep = make_sweep(tmp_path / "sweep")
    _move(sweep / "stepwise-s1", 1.6)
    row = equal_kl.above_plain(sweep).iloc[0]
    assert row["gain at equal KL"].n == row["seeds"] == 2 and row["beyond"] == 1


def test_nothing_to_compare_with(tmp_path):
    make_run(tmp_path / "alone")
    assert equal_kl.above_plain(tmp_path).empty
