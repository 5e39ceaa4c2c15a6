"""The workload and the arithmetic of the benchmark; a slow test runs all of it against TRL."""

import json

import numpy as np
import pytest

from analysis.benchmark import __main__
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


def test_both_sides_read_the_same_tokens(tmp_path):
    work = Work(str(tmp_path / "work"), "toy", 2, 2, "fp32", "cpu")
    prepare(work, np.array([[5, 3, 4], [1, 2, 9]]))
    for row in work.rows():
        whole = tokenizer()(text(row.prompt).strip() + text(row.chosen), add_special_tokens=False)["input_ids"]
        assert whole == [*row.prompt.tolist(), *row.chosen.tolist()]
        assert row.chosen[-1] == row.rejected[-1] == 2


def test_ratios_are_of_medians_and_count_both_passes():
    def run(reference, updates, peak):
        phases = {"updates": {"cpu": updates, "wall": 2 * updates}}
        if reference:
            phases["reference"] = {"cpu": reference, "wall": 2 * reference}
        return {"phases": phases, "peak_bytes": peak, "padding_share": 0.5, "first_loss": 0.7, "tokens": 1000}

    runs = {
        "trl_default": [run(0, 40, 80), run(0, 60, 80), run(0, 41, 80)],
        "trl_tuned": [run(10, 20, 100)] * 3,
        "engine": [run(2, 6, 30)] * 3,
    }
    result = __main__._compare(runs, num_pairs=4, clock="cpu")
    assert result["cpu_seconds_per_pair"] == {"trl_default": 41 / 4, "trl_tuned": 30 / 4, "engine": 2.0}
    assert (result["ratio_default"], result["ratio_tuned"]) == (41 / 8, 30 / 8)
    assert result["memory_ratio_tuned"] == 0.3
    assert result["unique_tokens_per_second"] == 125


@pytest.mark.slow
def test_the_whole_benchmark_agrees_with_trl(tmp_path):
    result = __main__.main(
        ["--pairs", "2", "--pairs-per-update", "2", "--pairs-per-microbatch", "2", "--repeats", "1"]
        + ["--steps-pairs", "8", "--device", "cpu", "--out", str(tmp_path)]
    )
    assert json.loads((tmp_path / "benchmark.json").read_text())["ratio_default"] == result["ratio_default"]
    assert result["first_step"]["loss_difference"] < 1e-5
    assert result["first_step"]["gradient_difference"] < 1e-5
    assert result["padding_share"]["engine"] == 0
    assert result["first_loss"]["engine"] == pytest.approx(np.log(2), abs=1e-6)
    assert result["cuda"]["not_measured"]
