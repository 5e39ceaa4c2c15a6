"""Jobs of a cluster: what is submitted, once for each run, and how one is requeued. SLURM's commands are stand-ins."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import submitit
from test_kills import children, wait_until

from sdpo import config
from sdpo.errors import UserError
from sdpo.launch import cluster
from sdpo.launch.nodes import Nodes, of_slurm
from sdpo.launch.order import Turn
from sdpo.launch.placement import Need
from sdpo.run.folder import Run

GOLDEN = Path(__file__).parent / "golden"
SBATCH = 'cp "$1" "$0.$$"; echo "$$" >> "$0.ids"; echo "Submitted batch job $$"'
SQUEUE = 'cat "$(dirname "$0")/alive"'


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The folder of stand-ins for srun, sbatch and squeue; the jobs in its file `alive` are running."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"srun": "", "sbatch": SBATCH, "squeue": SQUEUE}.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    (folder / "alive").write_text("")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def asked(folder, name, **launch):
    settings = {"model": {"name": "lab"}, "data": {"name": "lab"}, "launch": {"device": "auto", **launch}}
    return Run(config.from_composed(settings), folder / name, choices={}, arm=name)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_job_asks_for_the_nodes_gpus_and_cores_of_its_run(slurm, tmp_path, nodes):
    run = asked(tmp_path, "a", ranks=8 * nodes, nodes=nodes, threads=3)
    cluster.submit([run], tmp_path / "sweep", {"timeout_min": 60, "slurm_partition": "gpu"})
    (script,) = slurm.glob("sbatch.[0-9]*")
    text = script.read_text().replace(str(tmp_path), "TMP")
    text = re.sub(r"\S+/python\S* ", "PYTHON ", text)
    assert text == (GOLDEN / f"{nodes}_nodes.sh").read_text()


def test_a_plan_tells_what_jobs_would_ask_for(tmp_path):
    runs = [asked(tmp_path, name, ranks=ranks, threads=2) for name, ranks in [("a", 8), ("b", 8), ("c", 4)]]
    told = cluster.announce(runs, tmp_path / "sweep", {"cluster": "slurm", "timeout_min": 60, "cpus_per_task": 3})
    common = "name=sweep, nodes=1, tasks_per_node=1, cpus_per_task=3, gpus_per_node={}, "
    common += "slurm_srun_args=['--kill-on-bad-exit=1'], slurm_signal_delay_s=300, timeout_min=60"
    each = "{} jobs, one for each run, with " + common
    assert told.splitlines() == [each.format(2, 8), each.format(1, 4)]
    with pytest.raises(UserError, match="hydra.launcher.slurm: Unknown argument 'acount'"):
        cluster.announce(runs, tmp_path / "sweep", {"slurm_acount": "abc"})


def test_a_sweep_that_is_started_again_submits_no_run_twice(slurm, tmp_path):
    runs = [asked(tmp_path, name, ranks=ranks) for name, ranks in [("a", 1), ("b", 1), ("c", 2)]]
    first = [job.job_id for _, job in cluster.submit(runs, tmp_path / "sweep", {})]
    ids = (slurm / "sbatch.ids").read_text().split()
    assert first == [f"{ids[0]}_0", f"{ids[0]}_1", ids[1]]  # one array for each need
    (slurm / "alive").write_text(f"{first[1]} {first[2]}")
    again = {run.folder.name: job.job_id for run, job in cluster.submit(runs, tmp_path / "sweep", {})}
    ids = (slurm / "sbatch.ids").read_text().split()
    assert len(ids) == 3 and again == {"a": ids[2], "b": first[1], "c": first[2]}
    assert json.loads((tmp_path / "sweep" / "jobs.json").read_text()) == again


def test_jobs_that_were_submitted_are_known_although_the_next_are_refused(slurm, tmp_path):
    (slurm / "sbatch").write_text(f'#!/bin/sh\ntest -e "$0.ids" && exit 1\n{SBATCH}\n')
    runs = [asked(tmp_path, name, ranks=ranks) for name, ranks in [("a", 1), ("b", 2)]]
    with pytest.raises(UserError, match="hydra.launcher.slurm"):
        cluster.submit(runs, tmp_path / "sweep", {})
    (id,) = (slurm / "sbatch.ids").read_text().split()
    assert json.loads((tmp_path / "sweep" / "jobs.json").read_text()) == {"a": id}


def test_an_interrupt_cancels_every_job_although_one_has_ended(slurm, tmp_path, monkeypatch):
    (slurm / "scancel").write_text('#!/bin/sh\necho "$1" >> "$0.ids"\nexit 1\n')  # as SLURM does for an ended job
    (slurm / "scancel").chmod(0o755)
    runs = [asked(tmp_path, name) for name in "ab"]
    monkeypatch.setattr(cluster, "by_first_missing_step", lambda todo: [Turn(run, Need()) for run in todo])
    monkeypatch.setattr(cluster, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cluster.execute(runs, tmp_path / "sweep", {}, None)
    known = json.loads((tmp_path / "sweep" / "jobs.json").read_text())
    assert (slurm / "scancel.ids").read_text().split() == list(known.values())


def interrupted(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_saves_before_its_job_is_requeued(tmp_path):
    """The signal, its handler and the requeue are submitit's own; the run is a stand-in."""
    execution = cluster.Execution(tmp_path)
    saves = f"trap 'touch {tmp_path}/saved; exit 85' TERM; touch {tmp_path}/begun; while :; do sleep 0.1; done"
    execution.command = ["sh", "-c", f"test -e {tmp_path}/saved && exit; {saves}"]
    job = submitit.LocalExecutor(tmp_path / "jobs").submit(execution)
    wait_until((tmp_path / "begun").exists)
    (task,) = children(int(job.job_id))
    os.kill(task, signal.SIGUSR2)
    wait_until(job.done)
    assert (tmp_path / "saved").exists() and job.exception() is None  # requeued, the run ends well
    assert "Requeued job" in job.stdout()


def test_the_nodes_of_a_slurm_job_meet_at_the_first_one(monkeypatch):
    launch = config.Launch(ranks=4, nodes=2)
    assert of_slurm(config.Launch()) == Nodes(0, 1, "")
    with pytest.raises(UserError, match="launch.nodes=2, but this is no SLURM job of 2 nodes: submit the run with"):
        of_slurm(launch)
    task = {"JOB_ID": "4123456", "JOB_NUM_NODES": "2", "NODEID": "1", "JOB_NODELIST": "gpu[07-08]"}
    for name, value in task.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert of_slurm(launch) == Nodes(1, 2, "gpu07:13456")  # 10000 + 4123456 % 20000
    with pytest.raises(UserError, match="launch.ranks=5 cannot be shared by 2 nodes"):
        Nodes(0, 2, "a:1").torchrun(5, "run")
