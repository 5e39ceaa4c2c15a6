"""Gain over plain DPO at equal KL, by hand: the line runs from S (KL 0, gold .69) to plain DPO (KL 1.5)."""

import json

import pytest
from runs import make_run, make_sweep

from analysis import equal_kl


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
    text = manifest.read_text()
    manifest.write_text(text.replace(json.loads(text)["model_key"], "z" * 64))
    row = equal_kl.above_plain(sweep).iloc[0]
    assert row["gain at equal KL"].n == 2 and row["beyond"] == 1


def test_no_line_beyond_plain_dpo(tmp_path):
    sweep = make_sweep(tmp_path / "sweep")
    _move(sweep / "stepwise-s1", 1.6)
    row = equal_kl.above_plain(sweep).iloc[0]
    assert row["gain at equal KL"].n == row["seeds"] == 2 and row["beyond"] == 1


def test_nothing_to_compare_with(tmp_path):
    make_run(tmp_path / "alone")
    assert equal_kl.above_plain(tmp_path).empty
