"""The README's `python -m` commands, run on a sweep and a real run (others: test_conf.py), and what texts name."""

import importlib
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import CHECKOUT
from runs import make_sweep
from test_conf import composed, hydra_settings

from sdpo.run import model_card

PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
README, CONTRIBUTING = "\n".join(page.read_text() for page in PAGES), (CHECKOUT / "CONTRIBUTING.md").read_text()
CODE = ("sdpo", "analysis", "hydra_plugins")


def commands():
    found = re.findall(r"`(python -m .*?)`|^ +(python -m .*)", README.replace("\\\n", " "), re.MULTILINE)
    words = [shlex.split(inline or line, comments=True)[2:] for inline, line in found]
    return {shlex.join(command): command for command in words if "RUN" not in "".join(command)}  # a folder


def test_every_command_does_what_it_is_there_for(run, tmp_path, monkeypatch, capsys):
    run("split=by_source", "record=wandb", name="out/real")
    for sweep in ("demo", "controls"):
        make_sweep(tmp_path / "out" / sweep)
    monkeypatch.chdir(tmp_path)
    run_alone = [name for name in commands() if name.startswith("analysis.benchmark")]  # minutes: test_benchmark.py
    assert len(run_alone) == 4
    for name, (module, *arguments) in commands().items():
        if name not in run_alone:
            monkeypatch.setattr(sys, "argv", [module, *arguments])
            found = importlib.import_module(module)
            runpy.run_module(module, run_name="__main__") if hasattr(found, "__path__") else found.main()
            assert capsys.readouterr().out, name
    for made in ("out/demo/report.html", "out/mirror", "my_model/model.safetensors", "step2.parquet"):
        assert Path(made).exists(), made


def test_result_tables_have_the_form_of_the_command_that_is_shown(tmp_path, monkeypatch, capsys):
    heads = [line for line in README.splitlines() if line.startswith(("| arm |", "| of |"))]
    sweep = make_sweep(tmp_path / "sweep", answers=False)  # the README's sweeps ask no prompts
    monkeypatch.setattr(sys, "argv", ["tables", str(sweep), "--format", "markdown"])
    importlib.import_module("analysis.tables").main()
    assert len(heads) == 2 and set(heads) <= set(capsys.readouterr().out.splitlines())


def test_what_w_and_b_does_not_have_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name, said in {
        str(tmp_path): "there is no .wandb file in",
        "no/such": "no/such is neither a folder nor a project that W&B can read",
    }.items():
        monkeypatch.setattr(sys, "argv", ["analysis.from_wandb", name, "--out", "mirror"])
        with pytest.raises(SystemExit, match=f"error: {said}"):
            importlib.import_module("analysis.from_wandb").main()


@pytest.mark.parametrize("words", [words for words in commands().values() if words[0] == "analysis.benchmark"])
def test_a_command_of_the_benchmark_is_understood(words, capsys):
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"{words[0]}.__main__").main([*words[1:], "--help"])
    assert "ultrafeedback" in capsys.readouterr().out


def test_the_tree_of_contributing_names_every_file_of_the_code():
    listed, folders = [], []
    for line in CONTRIBUTING.split("```text")[1].split("```")[0].strip().splitlines():
        name, _, phrase = line.strip().partition(" ")
        folders[(len(line) - len(line.lstrip())) // 2 :] = [name]
        if not name.endswith("/"):
            assert phrase.strip(), name
            listed.append("".join(folders))
    files = [file for folder in CODE for file in (CHECKOUT / folder).rglob("*.py") if file.name != "__init__.py"]
    assert sorted(listed) == sorted(["train.py", *(str(file.relative_to(CHECKOUT)) for file in files)])


def test_the_readme_is_short_and_no_link_of_a_page_is_dead():
    assert len(PAGES[0].read_text().splitlines()) <= 220
    pages = [*PAGES, CHECKOUT / "CONTRIBUTING.md", CHECKOUT / "CHANGELOG.md"]
    assert sum(len(links(page)) for page in pages) > 3 and [link for page in pages for link in dead_links(page)] == []


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# Title\n## Two words, `code`\n")
    page = tmp_path / "page.md"
    page.write_text("# Here\n[a](other.md#two-words-code) [b](#here) [c](gone.md) [d](other.md#title-2) [e](#there)")
    assert dead_links(page) == ["gone.md", "other.md#title-2", "#there"]


def links(page):
    return [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if not link.startswith("https://")]


def dead_links(page):
    """The links of a page to files or headings of this repository that do not exist."""
    dead = []
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE) if target.is_file() and anchor else []
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        if not target.is_file() or (anchor and anchor not in anchors):
            dead.append(link)
    return dead


def test_the_result_tables_are_those_that_their_commands_wrote():
    """The table in a file of docs/results/ is as `python -m analysis.tables out/NAME --format markdown` printed it."""
    shown = result_tables(PAGES[0].read_text())
    written = [table for file in (CHECKOUT / "docs/results").glob("*.md") for table in result_tables(file.read_text())]
    assert len(shown) == 2 and [table for table in shown if table not in written] == []


def result_tables(text):
    """The tables of arms or contrasts in a text, each with all its rows."""
    return re.findall(r"^\| (?:arm|of) \|.*\n(?:\|.*\n?)+", text, re.MULTILINE)


def test_numbers_in_prose_are_those_that_a_command_wrote():
    """The decimals of the README's results and of docs/numbers.md stand in docs/results/ or in LOG.md."""
    assert decimals("DPO's 0.886 +- .023, at 1.5B 50.2 %") == {".886", ".023", "1.5", "50.2"}
    sources = [CHECKOUT / "LOG.md", *(CHECKOUT / "docs/results").glob("*.md")]
    written = set().union(*(decimals(source.read_text()) for source in sources))
    results = "".join(section for section in README.split("\n## ") if section.startswith("Results on"))
    for shown in (results, (CHECKOUT / "docs/numbers.md").read_text()):
        assert len(decimals(shown)) > 40 and decimals(shown) - written == set()


def decimals(text):
    """The numbers with a decimal point, without leading zeros and signs."""
    return {number.lstrip("0") for number in re.findall(r"\d*\.\d+", text)}


def test_the_demo_is_told_alike_everywhere():
    """docs/numbers.md repeats the gold reward of docs/results/demo.md."""
    (table,) = result_tables((CHECKOUT / "docs/results/demo.md").read_text())
    gold = {row.split(" | ")[0].strip("| "): row.split(" | ")[2] for row in table.splitlines()}
    cells = [gold[arm] for arm in ("all_at_once", "all_at_once_weak", "easy_to_hard")]
    assert f" | {' | '.join(cells)} |" in (CHECKOUT / "docs/numbers.md").read_text()


def test_the_sweeps_are_described_as_their_files_have_them():
    results = " ".join(README.split("## Results on the laboratory")[1].split("\n## ")[0].split())
    demo, controls = composed("experiment=demo"), hydra_settings("experiment=controls")
    num_pairs = sum(source.num_pairs for source in demo.data.lab.sources.values())
    assert f"{num_pairs:,} pairs of three sources, {demo.optim.epochs} epochs, beta {demo.loss.beta:g} (" in results
    assert float(re.search(r"lr (\S+?)\. ", results)[1]) == demo.optim.lr and len(demo.data.lab.sources) == demo.T == 3
    arms, seeds = controls.sweeper.params.arm.split(","), re.findall(r"\d+", controls.sweeper.params.seed)
    assert f"with {len(arms)} arms and {seeds[0]} seeds" in results
    assert "these eight contrasts" in results and len(controls.launcher.contrasts) == 8


def test_the_docs_become_a_site_without_a_warning(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    made = subprocess.run(build, cwd=CHECKOUT, capture_output=True, text=True)
    assert (made.returncode, made.stdout + made.stderr) == (0, "")
    pages = {page.parent.name: page.read_text() for page in (tmp_path / "site").rglob("index.html")}
    assert {"site", "data", "report", "numbers", "demo", "contributing"} <= pages.keys()
    assert [name for name, page in pages.items() if re.search(r'<(script|link)[^>]+="(https?:)?//', page)] == []


def test_continuous_integration_runs_what_a_submission_must_pass():
    jobs = yaml.safe_load((CHECKOUT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert jobs["test"]["steps"][-1]["run"] == ".ci/run" and (CHECKOUT / ".ci/run").is_file()


def test_every_file_that_a_text_names_exists():
    texts = [README, CONTRIBUTING, *(file.read_text() for file in (CHECKOUT / "conf").rglob("*.yaml"))]
    named = {name for text in texts for name in re.findall(r"\b(?:sdpo|analysis|tests)/[\w/]+\.\w+", text)}
    assert len(named) > 20 and {name for name in named if not (CHECKOUT / name).is_file()} == set()


def test_the_paper_s_authors_are_cited_alike():
    paper = yaml.safe_load((CHECKOUT / "CITATION.cff").read_text())["preferred-citation"]
    authors = " and ".join(f"{one['family-names']}, {one['given-names']}" for one in paper["authors"])
    card = " ".join(model_card.TEMPLATE.read_text().split())
    assert authors in card and f"{paper['start']}--{paper['end']}" in card
