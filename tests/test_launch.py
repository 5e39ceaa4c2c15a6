"""Ranks, started by the real torchrun: what one of them could not do is what the run says."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_error_of_a_rank_is_the_error_of_the_run(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "store"))
    command = [sys.executable, str(CHECKOUT / "train.py"), "model=local", f"model.path={toy / 'model'}", "data=local"]
    command += [f"data.train=[{toy / 'a.jsonl'}]", "data.template=plain", f"hydra.run.dir={tmp_path / 'run'}"]
    command += ["launch.ranks=2", "split=random", "split.num_chunks=99"]
    ended = subprocess.run(command, capture_output=True, text=True)
    told = "attention: sdpa (launch.attention=auto)\n"  # by the ranks, which speak on the parent's stdout
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, told, 1)
    assert ended.stderr.removeprefix("error: ").strip() == (tmp_path / "run" / "error.txt").read_text().splitlines()[0]
    assert "99" in ended.stderr
