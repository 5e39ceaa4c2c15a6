"""The README's `python -m` commands, run on a sweep and a real run where it says they lie (others: test_conf.py)."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import CHECKOUT
from runs import make_sweep

README = (CHECKOUT / "README.md").read_text()


def commands():
    found = re.findall(r"`(python -m .*?)`|^ +(python -m .*)", README.replace("\\\n", " "), re.MULTILINE)
    words = [shlex.split(inline or line, comments=True)[2:] for inline, line in found]
    return {shlex.join(command): command for command in words}


def test_every_command_does_what_it_is_there_for(run, tmp_path, monkeypatch, capsys):
    run("split=by_source", "record=wandb", name="out/real")
    for sweep in ("demo", "controls"):
        make_sweep(tmp_path / "out" / sweep)
    monkeypatch.chdir(tmp_path)
    run_alone = [name for name in commands() if name.startswith("analysis.benchmark")]  # minutes: test_benchmark.py
    assert len(run_alone) == 1
    for name, (module, *arguments) in commands().items():
        if name not in run_alone:
            monkeypatch.setattr(sys, "argv", [module, *arguments])
            importlib.import_module(module).main()
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
    for name, said in {str(tmp_path): "there is no .wandb file in", "no/such": "no/such is no folder here"}.items():
        monkeypatch.setattr(sys, "argv", ["analysis.from_wandb", name, "--out", "mirror"])
        with pytest.raises(SystemExit, match=f"error: {said}"):
            importlib.import_module("analysis.from_wandb").main()


def test_the_benchmark_s_command_is_understood(monkeypatch, capsys):
    (command,) = [words for words in commands().values() if words[0] == "analysis.benchmark"]
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"{command[0]}.__main__").main([*command[1:], "--help"])
    assert "ultrafeedback" in capsys.readouterr().out
