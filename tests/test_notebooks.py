"""Every notebook runs from top to bottom on a sweep, changes nothing in it, and is stored without outputs."""

import hashlib
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import CHECKOUT
from nbclient import NotebookClient
from runs import make_sweep

from analysis import tables

NOTEBOOKS = sorted((CHECKOUT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in SDPO_RUNS if it is set, else a synthetic sweep."""
    named = os.environ.get("SDPO_RUNS")
    return Path(named).resolve() if named else make_sweep(tmp_path_factory.mktemp("out") / "synthetic")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, folder, monkeypatch):
    monkeypatch.setenv("SDPO_RUNS", str(folder))
    before = _contents(folder)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=100, resources={"metadata": {"path": str(path.parent)}}).execute()
    said = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output.text for output in said if output.output_type == "stream" and output.name == "stderr"]
    shown = [page for output in said if "<svg" in (page := output.get("data", {}).get("text/html", ""))]
    assert len(shown) >= 2 and all(re.search(r"</svg>\s*<p>[A-Z][^<]+\.</p>", page) for page in shown)
    assert _contents(folder) == before
    if path.stem.startswith("3"):
        shown = "".join(output.get("data", {}).get("text/html", "") for output in said)
        assert all(cell in shown for cell in tables.show(tables.arms(folder))["gain over S"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        assert cell.cell_type != "code" or (cell.outputs == [] and cell.execution_count is None)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_installs_what_is_missing_and_runs_the_laboratory(path, tmp_path, monkeypatch):
    """As in Colab: no checkout around the notebook, nothing installed, no runs. The commands are only noted."""
    notebook, ran = nbformat.read(path, as_version=4), []
    first = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    named = first.replace("OWNER/NAME", "somebody/sdpo")
    monkeypatch.setattr("subprocess.run", lambda command, **rest: ran.append(command[1:]))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("SDPO_RUNS", str(tmp_path / "none"))
    with pytest.raises(SystemExit, match="REPOSITORY"):
        exec(first, {})
    exec(named, {})
    (install, train) = ran
    assert install[:3] == ["-m", "pip", "install"] and install[-1] == "git+https://github.com/somebody/sdpo"
    assert train == ["-m", "train", "experiment=demo", f"hydra.sweep.dir={tmp_path / 'none'}"]


def test_there_are_three():
    assert len(NOTEBOOKS) == 3


def _contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
