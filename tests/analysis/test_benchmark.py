"""The workload and the arithmetic of the benchmark, and its parts that fail; a slow test runs all of it against TRL."""

import json

import numpy as np
import pytest

from analysis.benchmark import __main__, parts, small, table
from analysis.benchmark.work import MAX_TOKENS, Work, from_file, from_profile, prepare, text, tokenizer
from sdpo.errors import UserError


def test_profiles_have_the_published_lengths_and_no_sequence_is_too_long():
    lengths = from_profile("ultrafeedback", 1000)
    # Cut at 1024 tokens, the means are those of the data set's card; see the profile.
    np.testing.assert_allclose(lengths.mean(0), (155, 275, 248), rtol=0.05)
    assert (lengths[:, :1] + lengths[:, 1:]).max() <= MAX_TOKENS and lengths.min() >= 2


def test_lengths_of_a_file_are_characters_over_four(tmp_path):
    rows = [{"prompt": "p" * 40, "chosen": f"{i}" + "c" * 79, "rejected": "r" * 120} for i in range(2)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert from_file(tmp_path / "pairs.jsonl", 2).tolist() == [[10, 20, 30]] * 2
    with pytest.raises(UserError, match="has 2 pairs, and the benchmark needs 3"):
        from_file(tmp_path / "pairs.jsonl", 3)


def toy(folder):
    return Work(str(folder), "tiny", 2, "fp32", "cpu", trl_batches=[2], packs=[64], compiled=[False])


def test_both_sides_read_the_same_tokens(tmp_path):
    work = toy(tmp_path / "work")
    prepare(work, np.array([[5, 3, 4], [1, 2, 9]]))
    for row in work.rows():
        whole = tokenizer()(text(row.prompt).strip() + text(row.chosen), add_special_tokens=False)["input_ids"]
        assert whole == [*row.prompt.tolist(), *row.chosen.tolist()]
        assert row.chosen[-1] == row.rejected[-1] == 2


def test_ratios_are_of_medians_and_count_both_passes():
    def run(reference, updates, peak):
        """Passes of this many CPU seconds, twice as many on the clock; each first pass takes 8 seconds more."""
        phases = {"updates": [[updates + 8, 2 * updates], [updates, 2 * updates]]}
        if reference:
            phases["reference"] = [[reference, 2 * reference], [reference, 2 * reference]]
        measured = {"peak_bytes": peak, "padding_share": 0.5, "first_loss": 0.7, "tokens": 1000}
        return measured | {"phases": phases, "settings": {"bf16": True}}

    runs = {
        "trl_default": [run(0, 40, 80), run(0, 60, 80), run(0, 41, 80)],
        "trl_tuned": [run(10, 20, 100), {"seconds": 1}],  # the second run was cut off before a result
        "engine": [run(2, 6, 30)] * 3,
        "trl_lora": [run(1, 1, 1)],  # its rival is missing
    }
    result = table.summarise(runs, {"engine_lora": "cut off"}, num_pairs=4, clock="cpu")
    assert [result["sides"][side]["steady"]["cpu"] for side in runs] == [41 / 4, 30 / 4, 2.0, 0.5]
    assert result["sides"]["engine"]["first"] == {"cpu": 4.0, "wall": 4.0}
    assert result["ratios"] == {
        "trl_default": {"first": 49 / 16, "steady": 41 / 8, "memory": 30 / 80},
        "trl_tuned": {"first": 38 / 16, "steady": 30 / 8, "memory": 0.3},
    }
    assert result["sides"]["engine"]["unique_tokens_per_second"] == {"cpu": 125, "wall": 62.5}
    assert "engine_lora FAILED: cut off" in table.render(result | {"machine": {"gpu": None}})


def test_steps_cost_passes_and_a_fixed_time_each():
    """64 pairs: 128 s of passes in 1 step and 192 s in 8; besides them 3 s, and 8 times 5 s."""

    def spent(passes, everything):
        return {"reference": [passes / 4, 0], "updates": [passes * 3 / 4, 0], "everything": [everything, 0]}

    steps = {"pairs": 64, "1": spent(128, 131), "8": spent(192, 232)}
    found = table.summarise({"steps": [steps]}, {}, num_pairs=8, clock="cpu")["steps"]
    assert (found["passes_8_steps_over_1"], found["fixed_seconds_per_step"]) == (1.5, 5)
    assert found["cost_8_steps_over_1"] == pytest.approx((12_859 * 3 + 40) / (12_859 * 2 + 3))


@pytest.mark.slow
def test_a_side_that_fails_loses_only_itself(tmp_path, monkeypatch):
    """TRL cannot be imported, and is not asked to train anything."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "trl.py").write_text("raise ImportError('no such kernel')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    result = __main__.main(
        ["--parts", "trl_tuned,engine", "--shape", "tiny", "--pairs", "2", "--pairs-per-update", "1", "--device", "cpu"]
        + ["--trl-batches", "1", "--repeats", "1", "--out", str(tmp_path / "out")]
    )
    assert result["failures"] == {"trl_tuned": "ImportError: no such kernel"}
    assert list(result["sides"]) == ["engine"] and result["ratios"] == {}
    engine = result["sides"]["engine"]
    assert engine["first_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert {name: len(passes) for name, passes in engine["phases"].items()} == {"reference": 2, "updates": 2}
    assert json.loads((tmp_path / "out" / "benchmark.json").read_text())["failures"] == result["failures"]


def test_a_part_that_is_cut_off_keeps_what_it_had_measured(tmp_path):
    """No process imports torch and measures in this time; what it had written before is read."""
    work = toy(tmp_path)
    (tmp_path / "engine.json").write_text('{"tried": 1}')
    assert parts.measure("engine", work, limit=0.2) == ({"tried": 1}, "cut off after 0.2 s")


@pytest.mark.slow
def test_models_side_by_side_train_in_processes_of_their_own(tmp_path):
    work = toy(tmp_path / "work")
    prepare(work, np.array([[5, 3, 4], [1, 2, 9]]))
    speeds = small._run(work, 2)
    assert len(speeds) == 2 and min(speeds) > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--parts", "engine,trl"], "--parts: trl is none of trl_default, trl_tuned"),
        (["--parts", "1b"], "--parts: 1b needs a GPU"),
        (["--trl-batches", "3"], "--pairs must be a multiple"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, sentence, capsys):
    with pytest.raises(SystemExit):
        __main__._parse(["--device", "cpu", *arguments])
    assert sentence in capsys.readouterr().err


def test_a_side_that_is_not_installed_is_refused_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(__main__, "find_spec", lambda name: None)
    assert __main__._parse(["--device", "cpu", "--parts", "engine,steps"]).parts == ["engine", "steps"]
    with pytest.raises(SystemExit):
        __main__._parse(["--device", "cpu"])
    assert "--parts: trl_default needs TRL: pip install" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_benchmark_agrees_with_trl(tmp_path):
    result = __main__.main(
        ["--pairs", "4", "--pairs-per-update", "4", "--trl-batches", "2,4", "--repeats", "1", "--device", "cpu"]
        + ["--shape", "tiny", "--lora-shape", "tiny", "--out", str(tmp_path)]
        + ["--parts", "trl_default,trl_tuned,engine,agreement,steps,trl_lora,engine_lora"]
    )
    assert json.loads((tmp_path / "benchmark.json").read_text())["ratios"] == result["ratios"]
    assert result["failures"] == {}
    assert result["agreement"]["loss_difference"] < 1e-5
    assert result["agreement"]["gradient_difference"] < 1e-5
    assert result["sides"]["engine"]["padding_share"] == 0
    tried, phases = (result["sides"]["trl_tuned"][name] for name in ("tried", "phases"))
    assert list(tried) == ["2 pairs", "4 pairs"]
    assert all(passes[0] == tried["2 pairs"][phase][0] for phase, passes in phases.items())  # of a process that begins
    assert {len(passes) for side in result["sides"].values() for passes in side["phases"].values()} == {2}
    for side in result["sides"].values():
        assert side["first_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert result["steps"]["fixed_seconds_per_step"] > 0
