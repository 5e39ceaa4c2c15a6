"""A run reports the error of its rank, under the real torchrun; a run is executed once however often it is started."""

import subprocess
import sys
import time
from dataclasses import replace

import pytest
import toys
from conftest import CHECKOUT, read_lines

from sdpo.errors import UserError
from sdpo.launch import local as launch
from sdpo.run import folder as run_folder


@pytest.mark.slow
def test_the_error_of_a_rank_is_the_error_of_the_run(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "store"))
    command = [sys.executable, str(CHECKOUT / "train.py"), "model=local", f"model.path={toy / 'model'}", "data=local"]
    command += [f"data.train=[{toy / 'a.jsonl'}]", "data.template=plain", f"hydra.run.dir={tmp_path / 'run'}"]
    command += ["launch.ranks=2", "split=all_at_once", "optim.lr=1e30", "optim.warmup=0", "optim.pairs_per_update=8"]
    ended = subprocess.run(command, capture_output=True, text=True)
    told = "attention: sdpa (launch.attention=auto)\n"  # printed by rank 0
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, told, 1)
    assert ended.stderr.removeprefix("error: ").strip() == (tmp_path / "run" / "error.txt").read_text().splitlines()[0]
    assert "not finite" in ended.stderr


def test_a_job_that_is_submitted_twice_is_done_once(toy, tmp_path, monkeypatch):
    """As a sweep does that is started again while jobs of its first start still run."""
    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "store"))
    settings, _ = toys.prepare(toy, tmp_path / "store", "split=all_at_once", "optim.epochs=60")
    folder = tmp_path / "run"
    run_folder.Run(settings, folder, choices={}, arm="once").prepare()
    run_folder.fail(folder, UserError("of a process that did it before"))
    jobs = [subprocess.Popen(launch.job(folder), stderr=subprocess.PIPE, text=True)]
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.05)
    begun = (folder / "manifest.json").read_bytes()
    run_folder.Run(settings, folder, choices={}, arm="again").prepare()
    assert (folder / "manifest.json").read_bytes() == begun  # a running run stays as it is
    with pytest.raises(UserError, match="another process runs other settings there"):
        run_folder.Run(replace(settings, seed=1), folder, choices={}, arm="other").prepare()
    jobs.append(subprocess.Popen(launch.job(folder), stderr=subprocess.PIPE, text=True))
    said = [job.communicate()[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0] and not (folder / "error.txt").exists()
    assert ["waiting for it to end" in text for text in said] == [False, True]
    assert [entry["update"] for entry in read_lines(folder, "train")] == list(range(1, 361))
    assert not read_lines(folder, "step")[0]["reused"]
