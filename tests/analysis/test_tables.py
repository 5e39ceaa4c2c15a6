"""Tables of runs and of the paper: exact numbers, no invented ones, and well-formed text, Markdown and LaTeX."""

import json
import re
import shutil
import subprocess
import sys
from math import nan
from pathlib import Path

import pandas as pd
import pytest
from conftest import CONF
from hydra import compose, initialize_config_dir
from runs import make_run, make_sweep

from analysis import checks, collect, published, report, table_format, tables
from sdpo.errors import UserError
from sdpo.stats import Interval


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return make_sweep(tmp_path_factory.mktemp("out") / "synthetic", seeds=6)


def test_arms(sweep):
    table = tables.arms(sweep).set_index("arm")
    assert table.index.tolist() == ["S", "all at once", "stepwise"]
    gold = table.loc["stepwise", "gold reward"]
    assert gold.value == pytest.approx(0.845) and gold.n == 6
    # seeds differ by .01, so the standard deviation is .01 * sqrt(3.5); t(.975, 5) = 2.570582
    assert gold.high - gold.value == pytest.approx(2.570582 * 0.01 * 3.5**0.5 / 6**0.5, abs=1e-7)
    assert table.loc["S", "gold reward"] == pytest.approx((0.69, 0.67, 0.71, 1))  # one S, so the interval of its own
    assert table.loc["stepwise", "gain over S"].value == pytest.approx(0.845 - 0.69)
    assert table["training (s)"].tolist()[1:] == pytest.approx([1.2, 2.4])  # 12 updates a step, 0.1 s each
    assert table["steps reused"].tolist()[1:] == ["5 of 6", "5 of 12"]


def test_a_seed_that_left_s_is_named_and_moves_no_median(tmp_path):
    folder = make_sweep(tmp_path / "far")
    file = folder / "stepwise-s1" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    next(line for line in lines if line["kind"] == "eval" and line["t"] == 2)["eval"]["lab/kl"]["value"] = 9.6
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = tables.medians(folder).set_index("arm")
    assert table.loc["stepwise"].tolist() == pytest.approx([0.83, 0.83, (1.5 + 9.6 + 1.5) / 3, 1.5, 9.6, "1 of 3"])
    assert table.loc["all at once", "left S"] == "0 of 3"
    read = (collect.runs, collect.measures, collect.steps, collect.references)
    found = {warning.title: warning.cases for warning in checks.warnings(*(one(folder) for one in read))}
    assert found["A seed left S"] == ["stepwise, seed 1: KL 9.6 nats after step 2"]
    assert "<td>9.60</td><td>1 of 3</td>" in report.write_report(folder).read_text()
    assert tables.medians(folder / "stepwise-s1").empty  # of one seed the mean says all


def test_every_measure_that_was_asked_for_is_shown(sweep):
    table = tables.others(sweep).set_index("measure")
    assert table.index.tolist() == ["generate/tokens", "generate/ended"]
    assert list(table) == ["S", "all at once", "stepwise"] and table.notna().all(axis=None)
    assert tables.others(make_run(sweep.parent / "unasked", answers=False)).empty


def test_contrast(sweep):
    row = tables.contrasts(sweep).iloc[0]
    assert row["contrast"] == "stepwise - all at once" and row["seeds"] == 6
    assert row["difference"] == pytest.approx((0.02, 0.02, 0.02, 6), abs=1e-9)
    assert row["p"] == row["p, Holm"] == 2 / 64
    assert row["verdict"] == "higher"


def test_inert_reference(tmp_path):
    table = tables.contrasts(make_sweep(tmp_path / "inert", gains=(0.0, 0.0), leverage=0.019))
    assert table["verdict"].tolist() == ["the reference was inert"]
    same_rule = make_sweep(tmp_path / "order", arms=("easy first", "hard first"), gains=(0.0, 0.0), leverage=0.019)
    assert tables.contrasts(same_rule)["verdict"].tolist() == ["within noise"]


def test_one_run_keeps_its_own_interval(sweep):
    gold = tables.arms(sweep / "stepwise-s2").set_index("arm").loc["stepwise", "gold reward"]
    assert gold == pytest.approx((0.84, 0.82, 0.86, 1))
    assert tables.contrasts(sweep / "stepwise-s2").empty


def test_steps(sweep):
    table = tables.steps(sweep / "stepwise-s0")
    assert table["reference"].tolist() == ["M_0", "M_1"]
    assert [mean.value for mean in table["first loss"]] == pytest.approx([0.693147, 0.693147], abs=1e-6)


def test_runs_that_cannot_be_compared(sweep, tmp_path):
    make_run(tmp_path / "again", arm="stepwise", seed=0)
    with pytest.raises(UserError, match="two runs with seed 0"):
        tables.contrasts(sweep, tmp_path / "again")
    with pytest.raises(UserError, match="stepwise has two runs with seed 0"):
        tables.arms(sweep, tmp_path / "again")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.8524, "0.852"),
        (Interval(0.8524, 0.8414, 0.8634, 3), "0.852 ± 0.011"),
        (Interval(0.8524, 0.8, 0.9, 3), "0.852 [0.800, 0.900]"),
        (Interval(0.8524, nan, nan, 1), "0.852"),
        (0.0004, "< 0.001"),
        (0.0, "0.000"),
        (nan, ""),
    ],
)
def test_number(number, text):
    assert table_format.number(number) == text


def test_paper_facts_are_consistent():
    """H4 is the mean of its tasks within rounding, except for the row that its notes name; every row is complete."""
    main = published.facts()[1]
    off = []
    for row in main["rows"]:
        h4, *tasks = row["paper"]
        off += [row["model"]] * (abs(h4 - sum(tasks) / 4) > 0.0101)
    assert off == ["SOLAR-0-70B-16bit"]
    for table in published.facts():
        assert all(len(row["paper"]) == len(table["columns"]) for row in table["rows"])


def test_paper_without_runs_invents_nothing(tmp_path):
    for table in published.facts():
        assert published.side_by_side(table, tmp_path)["difference"].isna().all()


def test_published_numbers_stand_beside_ours(tmp_path, say):
    sweep = make_sweep(
        tmp_path / "published_refdpo_own", arms=[f"model=tulu_7b all_at_once loss.beta={b}" for b in (0.1, 0.05)]
    )
    for path in sweep.glob("*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            if line["kind"] == "eval":  # as evaluate=judge measures it
                rate = {"value": 0.12, "low": None, "high": None, "n": 805}
                line["eval"]["judge/alpaca_eval/length_controlled"] = rate
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = say("published", "--out", tmp_path)
    lines = said[said.index("two policies with themselves as references") :].splitlines()
    assert lines[2].split() == ["model", "LC", "ours", "diff", "reward", "accuracy,", "ours", "seeds"]
    known, unknown = lines[9].split(), lines[11].split()
    assert known[:5] == ["Tulu-2-7B,", "beta", "0.1", "9.38", "12.00"] and "2.62" in known and known[-1] == "3"
    assert unknown == ["Tulu-2-7B,", "beta", "0.02", "10.46"]


def test_paper_beside_ours(tmp_path):
    make_sweep(tmp_path / "paper_figure2", arms=("all at once", "by_source"))
    figure2 = published.facts()[-1]
    ours = published.side_by_side(figure2, tmp_path).set_index("model")
    gammas = collect.trajectory(tmp_path / "paper_figure2").query(
        "arm == 'by_source' and role == 'policy' and update == -1 and chunk == 2 and t == 1"
    )
    expected = gammas.groupby("seed")["gamma"].mean().mean()
    assert ours.loc["M_1", "ours"].value == expected and ours.loc["M_1", "ours"].n == 3
    assert ours.loc["M_1", "difference"] == expected - -25.10


def test_the_sweep_of_a_paper_s_table_is_found_under_the_name_that_hydra_gives_it(tmp_path, say):
    command = ["experiment=paper/figure2", "model.path=me/sft"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        named = Path(compose("config", overrides=command, return_hydra_config=True).hydra.sweep.dir).name
    assert re.fullmatch("paper_figure2-[0-9a-f]{6}", named)
    make_sweep(tmp_path / named, arms=("all at once", "by_source"), seeds=1)
    assert f"Ours: {tmp_path / named}, mean" in say("paper", "--out", tmp_path)
    make_sweep(tmp_path / "paper_figure2", arms=("all at once", "by_source"), seeds=1)
    with pytest.raises(SystemExit, match=f"holds several sweeps of paper/figure2: paper_figure2, {named}; "):
        say("paper", "--out", tmp_path)


def test_formats(sweep):
    table = pd.DataFrame({"arm": ["a_b|c", "50 % & {more}"], "value": ["-1.5 ± 0.1", ""]})
    assert "| a_b\\|c | -1.5 ± 0.1 |" in table_format.render(table, "Title", ["note"], "markdown")
    assert r"50 \% \& \{more\} &  \\" in table_format.render(table, "Title", [], "latex")
    assert r"a\_b|c & $-$1.5 $\pm$ 0.1 \\" in table_format.render(table, "Title", [], "latex")
    models = pd.DataFrame({"reference": ["0.4 M_0 + 0.6 M_12", "M_t"], "of": ["VLLM_0", ""]})
    assert r"0.4 $M_{0}$ + 0.6 $M_{12}$ & VLLM\_0 \\" in table_format.render(models, "Title", [], "latex")
    labelled = table_format.render(table, "Arms in order: mean and 95 %", [], "latex")
    assert "\\caption{Arms in order: mean and 95 \\%}\n\\label{tab:arms-in-order}\n" in labelled
    lines = table_format.render(table, "Title", [], "text").splitlines()
    assert len({len(line) for line in lines[1:]}) == 1
    heads = (r"\begin{tabular}{lr}", r"\begin{tabular}{ll}")  # numbers stand on the right, words on the left
    assert all(head in table_format.render(t, "T", [], "latex") for head, t in zip(heads, (table, models), strict=True))


def test_the_size_says_whether_seeds_share_s(sweep):
    runs = collect.runs(sweep)
    assert tables.size(runs) == "2 arms, 6 seeds, all from one S"
    assert tables.size(runs.assign(model_key=runs["seed"])) == "2 arms, 6 seeds, from 6 different S"
    assert tables.size(runs[:1]) == "1 arm, 1 seed"


@pytest.fixture
def say(monkeypatch, capsys):
    """say(*arguments) is the output of `python -m analysis.tables ARGUMENTS`."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tables", *map(str, arguments)])
        tables.main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("what", ["sweep", "paper"])
def test_latex_compiles(sweep, tmp_path, say, what):
    if not shutil.which("pdflatex"):
        pytest.skip("no pdflatex on the path")
    table = say(sweep if what == "sweep" else what, "--format", "latex")
    needed = re.findall(r"\\usepackage\S+?\}", table.splitlines()[0])
    assert len(needed) == 3 and "documentclass" not in table
    (tmp_path / "table.tex").write_text(table)
    document = [r"\documentclass{article}", *needed, r"\begin{document}", r"\input{table}", r"\end{document}"]
    (tmp_path / "paper.tex").write_text("\n".join(document))
    compiler = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    made = subprocess.run(compiler, cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-2000:]
    assert "Overfull" not in made.stdout


def test_command_line(sweep, say):
    assert "0.845 ± 0.020" in say(sweep)
    with pytest.raises(SystemExit, match="^error: .* is no run folder"):
        say(sweep / "nothing")
