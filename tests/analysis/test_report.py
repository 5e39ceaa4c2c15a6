"""The report page: complete, self-contained, with the numbers of the tables; opened in a browser if there is one."""

import json
import re
import shutil
import sys
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest
from browser import BINARY, browser
from runs import make_run, make_sweep

from analysis import checks, collect, report, tables


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return make_sweep(tmp_path_factory.mktemp("out") / "synthetic")


@pytest.fixture(scope="module")
def page(sweep):
    return report.write_report(sweep)


def test_page_holds_everything_and_asks_for_nothing(page):
    html = page.read_text()
    assert page.name == "report.html"
    assert html.count("<svg") == html.count("</svg>") == html.count("<figcaption>") == 7
    assert not re.search(r"<script|<link(?! rel=\"icon\" href=\"data:)|src=|@import|url\((?!#)", html)
    assert "python train.py experiment=synthetic" in html
    shared = "model=lab, data=lab, score=gamma, loss=dpo, tune=full"
    assert f"<p>Stepwise DPO, 2 arms, 3 seeds, all from one S: 6 of 6 runs finished, all with {shared}.</p>" in html
    assert "2 arms, 3 seeds, all from one S. M_t is" in html  # above the figures
    for heading in ("Verdicts", "Reasons for doubt", "What was run", "Run it again"):
        assert f"<h2>{heading}</h2>" in html


def test_page_is_well_formed(page):
    unclosed = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag not in ("meta", "link", "br"):
                unclosed.append(tag)

        def handle_endtag(self, tag):
            assert unclosed.pop() == tag

        def handle_startendtag(self, tag, attributes):
            pass

    Checker().feed(page.read_text())
    assert unclosed == []


def test_page_shows_the_tables_numbers(page, sweep):
    html = page.read_text()
    for table in (tables.arms(sweep), tables.contrasts(sweep), tables.steps(sweep)):
        shown = tables.show(table)
        assert "".join(f'<th scope="col">{escape(name)}</th>' for name in shown) in html
        for row in shown.itertuples(index=False, name=None):
            assert "".join(f"<td>{escape(cell)}</td>" for cell in row) in html


def test_answers_stand_side_by_side(page, sweep):
    alone = report.write_report(sweep / "stepwise-s0").read_text()
    of_run = re.findall(r"<h4>(.*?)</h4><p class=\"said\">(M_. of \w+)?", alone)
    assert of_run[:3] == [("S", "M_0 of stepwise"), ("M_1", "M_1 of stepwise"), ("M_2", "M_2 of stepwise")]
    assert len(of_run) == 9 and "What is a &lt; b?" in alone and "(empty)" in alone
    of_sweep = re.findall(r"<h4>(.*?)</h4><p class=\"said\">(M_. of [\w ]+) says", page.read_text())
    assert of_sweep == [
        ("S", "M_0 of all at once"),
        ("all at once", "M_1 of all at once"),
        ("stepwise", "M_2 of stepwise"),
    ]


def test_names_are_escaped(tmp_path):
    folder = make_sweep(tmp_path / "escaped", arms=("all at once", "<b>beta & co"), seeds=1)
    html = report.write_report(folder).read_text()
    assert "<b>beta" not in html and "&lt;b&gt;beta &amp; co" in html


def test_report_of_one_run(sweep, tmp_path):
    run = shutil.copytree(sweep / "stepwise-s0", tmp_path / "alone")
    html = report.write_report(run).read_text()
    for title in ("Trajectories", "Learning order", "Result", "Lineage"):
        assert f">{title}</h" in html
    assert "<h2>Verdicts</h2>" not in html and "1 arm, 1 seed" in html


def test_figures_as_files(sweep, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(sweep, tmp_path / "sweep")
    monkeypatch.setattr(sys, "argv", ["report", str(folder), "--figures", str(tmp_path / "figures")])
    report.main()
    page, *files = map(Path, capsys.readouterr().out.split())
    assert page == folder / "report.html" and sorted((tmp_path / "figures").iterdir()) == sorted(files)
    assert page.read_text().count("<svg") == len(files) / 2
    frontier = tmp_path / "figures" / "frontier.svg"
    assert ElementTree.parse(frontier).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert frontier.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_sweep_in_which_nothing_ended(tmp_path):
    run = make_run(tmp_path / "sweep" / "broken")
    (run / "done").unlink()
    (run / "error.txt").write_text("update 3: the loss is not finite\n\nTraceback\n")
    html = report.write_report(tmp_path / "sweep").read_text()
    assert "broken: update 3: the loss is not finite" in html and "<svg" not in html


def test_run_without_measures(tmp_path):
    run = make_run(tmp_path / "unmeasured")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "eval":
            line["eval"] = {}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = json.loads((run / "summary.json").read_text())
    summary["headline"] = {"name": None, "value": None, "n": 0}
    (run / "summary.json").write_text(json.dumps(summary))
    assert "Loss" in report.write_report(run).read_text()


def test_warnings_name_their_cases(sweep):
    found = {warning.title.split(":")[0]: warning.cases for warning in _warnings(sweep)}
    fell = "log-ratio to S -1.00 nats (chosen), -4.00 nats (rejected)"
    assert found["Displacement"] == [f"all at once: {fell}", f"stepwise: {fell}"]
    assert found["Too few seeds for a verdict"] == ["all at once: 3 seeds", "stepwise: 3 seeds"]
    assert not any("close to" in title or "inert" in title for title in found)


def test_warnings_of_length_contamination_and_inertia(tmp_path):
    run = make_run(tmp_path / "doubtful", leverage=0.001)
    measures = collect.measures(run)
    measures.loc[measures["name"] == "preference/shorter_accuracy", "value"] = 0.79
    references = collect.references(run).assign(seen=True)
    found = checks.warnings(collect.runs(run), measures, collect.steps(run), references)
    said = " ".join(case for warning in found for case in warning.cases)
    assert "stepwise, all sources: 0.800, shorter is better 0.790" in said
    assert "stepwise, step 2: M_1, mean gamma" in said
    assert "stepwise: leverage 0.0010" in said


def test_it_is_no_displacement_if_one_of_the_rewards_rose(sweep):
    measures = collect.measures(sweep)
    assert checks.displacement(measures).cases
    measures.loc[measures["measure"] == "preference/log_ratio_rejected", ["value", "low", "high"]] = 1.0
    assert not checks.displacement(measures).cases


def _warnings(folder):
    tables_read = (collect.runs, collect.measures, collect.steps, collect.references)
    return checks.warnings(*(read(folder) for read in tables_read))


@pytest.mark.skipif(BINARY is None, reason="no chromium on the path")
def test_page_in_a_browser(page, sweep, tmp_path):
    """No console message, no request, no sideways scrolling, every figure visible; narrow and wide, light and dark."""
    alone = report.write_report(sweep / "stepwise-s0")
    with browser(tmp_path / "profile") as tab:
        papers = set()
        for file, width, theme in ((p, w, t) for p in (page, alone) for w in (400, 1400) for t in ("light", "dark")):
            tab.open(file, width, theme)
            assert tab.complaints() == []
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert tab.evaluate(
                "[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().width > 300)"
            )
            if file == page:  # what the contrasts come to is seen without scrolling
                heads = "[...document.querySelectorAll('th')].filter(h => h.textContent == 'difference')"
                assert 0 < tab.evaluate(f"{heads}[0].getBoundingClientRect().right") <= width
            names = "[...document.querySelectorAll('td:first-child')].filter(c => !c.textContent.includes(' '))"
            assert tab.evaluate(f"{names}.every(c => c.getBoundingClientRect().height < 50)"), "a name is one line"
            assert tab.evaluate("parseFloat(getComputedStyle(document.body).fontSize)") >= 16
            ink, paper = (
                tab.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor")
            )
            axis = tab.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
            assert axis == ink, "text in figures follows the theme"
            papers.add(paper)
        assert len(papers) == 2


def test_seeds_that_changed_nothing_are_named():
    steps = pd.DataFrame({"arm": list("aabb"), "seed": [0, 1, 0, 1], "t": 1, "last_loss": [0.5, 0.5, 0.5, 0.6]})
    assert checks.equal_seeds(steps).cases == ["a: 2 equal seeds"]
