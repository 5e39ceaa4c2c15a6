"""A run reports the error of its rank, under the real torchrun; a run is executed once however often it is started."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import toys
from conftest import CHECKOUT, read_lines

from sdpo import config, distributed, stepwise
from sdpo.errors import UserError
from sdpo.launch import local, rank
from sdpo.launch.nodes import alone
from sdpo.run import folder as run_folder
from sdpo.store.artifacts import Store, key_of


@pytest.mark.slow
def test_the_error_of_a_rank_is_the_error_of_the_run(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "store"))
    command = [sys.executable, str(CHECKOUT / "train.py"), "model=local", f"model.path={toy / 'model'}", "data=local"]
    command += [f"data.train=[{toy / 'a.jsonl'}]", "data.template=plain", f"hydra.run.dir={tmp_path / 'run'}"]
    command += ["launch.ranks=2", "split=all_at_once", "optim.lr=1e30", "optim.warmup=0", "optim.pairs_per_update=8"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout.count("\n"), ended.stderr.count("\n")) == (1, 1, 1)
    assert ended.stdout.startswith("attention: sdpa (launch.attention=auto); kernels of the layers: plain")  # by rank 0
    assert ended.stderr.removeprefix("error: ").strip() == (tmp_path / "run" / "error.txt").read_text().splitlines()[0]
    assert "not finite" in ended.stderr


RANKS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
open(sys.argv[1] + os.environ["RANK"], "w").close()
while not os.path.exists(sys.argv[1] + "0"):
    time.sleep(0.01)
if os.environ["RANK"] == "1":
    {end}
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("end", "cause"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", UserError("a rank was killed by SIGKILL; log has the details")),
        ("sys.exit(85)", SystemExit(85)),
    ],
)
def test_the_rank_that_ended_first_is_the_cause_although_torchrun_then_stops_the_other(tmp_path, end, cause):
    """The ranks are children of the real torchrun; rank 0 ends with STOPPED when it is asked to, as ours do."""
    settings = config.from_composed({"model": {"name": "lab"}, "data": {"name": "lab"}, "launch": {"ranks": 2}})
    (tmp_path / "ranks.py").write_text(RANKS.format(end=end))
    torchrun = [sys.executable, *local.TORCHRUN, *alone(settings.launch).torchrun(2, "run")]
    ended = subprocess.run([*torchrun, tmp_path / "ranks.py", tmp_path / "began"], capture_output=True, text=True)
    assert "exitcode  : 85" in ended.stderr
    found = local._cause(settings, Path("log"), ended.stderr)
    assert (type(found), str(found)) == (type(cause), str(cause))


@pytest.mark.slow
def test_a_job_that_is_submitted_twice_is_done_once(toy, tmp_path, monkeypatch):
    """As a sweep does that is started again while jobs of its first start still run."""
    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "store"))
    settings, _ = toys.prepare(toy, tmp_path / "store", "split=all_at_once", "optim.epochs=60")
    folder = tmp_path / "run"
    run_folder.Run(settings, folder, choices={}, arm="once").prepare()
    run_folder.fail(folder, UserError("of a process that did it before"))
    jobs = [subprocess.Popen(local.job(folder), stderr=subprocess.PIPE, text=True)]
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.05)
    begun = (folder / "manifest.json").read_bytes()
    run_folder.Run(settings, folder, choices={}, arm="again").prepare()
    assert (folder / "manifest.json").read_bytes() == begun  # a running run stays as it is
    with pytest.raises(UserError, match="another process runs other settings there"):
        run_folder.Run(replace(settings, seed=1), folder, choices={}, arm="other").prepare()
    jobs.append(subprocess.Popen(local.job(folder), stderr=subprocess.PIPE, text=True))
    said = [job.communicate()[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0] and not (folder / "error.txt").exists()
    assert ["waiting for it to end" in text for text in said] == [False, True]
    assert [entry["update"] for entry in read_lines(folder, "train")] == list(range(1, 361))
    assert not read_lines(folder, "step")[0]["reused"]


class NoMemory(MemoryError):
    def __str__(self):
        time.sleep(1)  # long enough for the other rank to write its error first, if the connection is closed by now
        return "no memory is left"


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """ranks(work) forks two ranks that do `work` instead of training; returns the run folder and their exit codes."""

    def start(work, **launch):
        launch |= {"ranks": 2, "device": "cpu"}
        settings = config.from_composed({"model": {"name": "lab"}, "data": {"name": "lab"}, "launch": launch})
        run_folder.Run(settings, tmp_path / "run", choices={}, arm="").prepare()
        monkeypatch.setattr(stepwise, "run", work)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}

        def one(number):
            os.environ |= {**world, "RANK": str(number)}
            rank.exit_at_signals()
            rank.execute(settings, tmp_path / "run")

        processes = [multiprocessing.get_context("fork").Process(target=one, args=[number]) for number in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        return tmp_path / "run", [process.exitcode for process in processes]

    return start


def test_the_rank_that_failed_is_reported_and_not_the_one_that_lost_it(ranks):
    """The ranks are real; what they run is a stand-in in which rank 1 fails while rank 0 waits for it."""

    def work(config, folder):
        if distributed.rank() == 1:
            raise NoMemory
        distributed.barrier()

    folder, codes = ranks(work)
    assert run_folder.failure(folder) == "NoMemory: no memory is left" and 0 not in codes


def test_a_wait_for_another_arm_is_longer_than_the_timeout(ranks, tmp_path, capfd):
    """Another process makes the artifact; it holds the lock until the test ends its wait, twice the timeout later."""
    store = Store(tmp_path / "store")
    made = multiprocessing.Event()

    def make(folder):
        made.set()
        time.sleep(8)

    def work(config, folder):
        assert store.make("value", {}, lambda folder: None).reused

    first = multiprocessing.get_context("fork").Process(target=store.make, args=["value", {}, make])
    first.start()
    made.wait()
    assert ranks(work, timeout_minutes=4 / 60)[1] == [0, 0]
    first.join()
    told = capfd.readouterr().err
    assert told.startswith(f"waiting for process {first.pid} on ")
    assert told.endswith(f", which makes value {key_of('value', {})[:16]}\n")
    assert told.count("\n") == 1


def test_a_run_that_is_told_to_stop_ends_with_code_85_on_every_rank(ranks):
    def work(config, folder):
        os.kill(os.getpid(), signal.SIGUSR2)
        distributed.barrier()

    folder, codes = ranks(work)
    assert codes == [85, 85] and run_folder.failure(folder) is None and not (folder / "done").exists()


def test_a_frozen_rank_ends_the_run_after_the_timeout(ranks):
    def work(config, folder):
        if distributed.rank() == 1:
            time.sleep(6)
        distributed.barrier()

    folder, codes = ranks(work, timeout_minutes=3 / 60)
    assert run_folder.failure(folder).startswith("a rank did not answer for 0.05 minutes (launch.timeout_minutes)")
    assert 0 not in codes
