"""Sweeps: names and the table worked by hand; real sweeps with a run that fails, and interrupted ones."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from conftest import CHECKOUT
from processes import alive, children, wait_until

from sdpo import config
from sdpo.distributed import STOPPED
from sdpo.errors import UserError
from sdpo.launch import sweep
from sdpo.launch.summary import summary_table
from sdpo.run import folder as run_folder
from sdpo.run.folder import Run


def test_an_arm_is_named_by_all_that_varies_but_the_seed():
    jobs = [["loss=dpo", f"seed={seed}", f"optim.lr={lr}", f"arm={arm}"] for seed in "01" for lr, arm in ("1a", "2b")]
    assert run_folder.labels(jobs) == ["optim.lr=1 a", "optim.lr=2 b"] * 2
    assert run_folder.labels([["seed=0"], ["seed=1"]]) == ["", ""]
    assert run_folder.labels([["arm=a", "seed=0"], ["arm=a", "seed=1"]]) == ["a", "a"]
    assert run_folder.labels([["+steps.2.loss.beta=1"], ["+steps.2.loss.beta=2"]])[0] == "steps.2.loss.beta=1"


def asked(folder, name, **launch):
    settings = {"model": {"name": "lab"}, "data": {"name": "lab"}, "launch": {"device": "auto", **launch}}
    return Run(config.from_composed(settings), folder / name, choices={}, arm=name[0])


def test_the_table_counts_seeds_steps_and_failures(tmp_path):
    finished = {"a0": (0.5, 2, 0), "a1": (0.75, 1, 1), "b0": (0.25, 2, 0)}
    asked_for = [asked(tmp_path, name) for name in ("a0", "a1", "b0", "b1")]
    for run in asked_for:
        run.prepare()
        if run.folder.name in finished:
            value, trained, reused = finished[run.folder.name]
            summary = {"headline": {"name": "lab/gold", "value": value, "n": 9}, "seconds": 2.0}
            summary |= {"trained_steps": trained, "reused_steps": reused}
            (run.folder / "summary.json").write_text(json.dumps(summary))
            run_folder.finish(run.folder, run_folder.stamp(run.config))
    run_folder.fail(asked_for[3].folder, UserError("no\nway"))
    # Two seeds at .5 and .75: t(.975, 1) = 12.706, standard error .125, so .625 +- 1.588. a0 was finished before.
    table = summary_table(asked_for, {tmp_path / name for name in ("a1", "b0", "b1")})
    assert [line.split() for line in table.splitlines()] == [
        ["arm", "seeds", "headline", "seconds,", "sum", "steps", "trained", "reused"],
        ["a", "2/2", "lab/gold", "0.625", "[-0.9633,", "2.213]", "4", "1", "3"],
        ["b", "1/2", "lab/gold", "0.25", "2", "2", "0"],
        ["failed:", "b1:", "no", "way"],
        ["3", "of", "4", "runs", "finished;", "3", "steps", "trained,", "3", "reused"],
    ]


@pytest.fixture
def finished(tmp_path):
    """A finished run that read two files."""
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "chunks.json").write_text("{}")
    data = {"name": "local", "train": [str(tmp_path / "a.jsonl")]}
    split = {"name": "replay", "path": str(tmp_path / "chunks.json")}
    settings = config.from_composed({"model": {"name": "lab"}, "data": data, "split": split})
    run = Run(settings, tmp_path / "run", choices={}, arm="")
    run.prepare()
    (run.folder / "steps").mkdir()
    (run.folder / "steps" / "1").symlink_to(tmp_path)
    run_folder.finish(run.folder, run_folder.stamp(run.config))
    assert run.finished
    return run


@pytest.mark.parametrize("file", ["a.jsonl", "chunks.json"])
def test_a_run_whose_files_changed_is_not_finished(finished, tmp_path, file):
    (tmp_path / file).write_text("{} ")
    assert not finished.finished


def test_a_run_whose_files_changed_while_it_trained_is_not_finished(finished, tmp_path):
    at_start = run_folder.stamp(finished.config)
    (tmp_path / "a.jsonl").write_text("{} ")
    run_folder.finish(finished.folder, at_start)
    assert not finished.finished


@pytest.mark.parametrize("name", ["set:train", "set"])
def test_files_at_any_depth_of_a_folder_of_data_count(tmp_path, name):
    (tmp_path / "set" / "train").mkdir(parents=True)
    data = {"name": "hub", "train": [str(tmp_path / name)], "nominal": {"set": {"pairs": 9, "tokens": 9}}}
    settings = config.from_composed({"model": {"name": "lab"}, "data": data})
    before = run_folder.stamp(settings)
    (tmp_path / "set" / "train" / "0.parquet").write_text("")
    assert run_folder.stamp(settings) != before


def test_an_error_that_no_disk_had_room_for_is_one_sentence(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        run_folder.fail(tmp_path, UserError("the cause"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert run_folder.failure(tmp_path) == "the run failed, but its error could not be written: the disk may be full"


def test_a_run_of_other_settings_or_without_its_models_is_not_finished(finished, tmp_path):
    assert not finished._replace(config=replace(finished.config, seed=1)).finished
    (finished.folder / "steps" / "2").symlink_to(tmp_path / "removed")
    assert not finished.finished


def test_a_run_that_is_prepared_is_not_finished(finished):
    finished.prepare()
    assert not finished.finished


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"backend": "cloud"}, "hydra.launcher.backend is 'cloud'; it can be local, slurm"),
        ({"n": 0}, "hydra.launcher.n is 0; it can be auto or a number above 0"),
        ({"contrasts": {"order": ["a", "c"]}}, "a contrast names the arm 'c'; this sweep has 'a', 'b'"),
        ({"contrasts": {"order": ["a"]}}, "the contrast 'order' has 1 arms; it compares two"),
        ({"contrasts": dict.fromkeys("ABCDEFGHI", ["a", "b"])}, "9 contrasts are declared; at most 8 are allowed"),
    ],
)
def test_what_the_launcher_cannot_do_is_refused(tmp_path, changes, sentence):
    given = {"n": "auto", "backend": "local", "slurm": {}, "contrasts": {}, "overrides": []} | changes
    with pytest.raises(UserError, match=sentence):
        sweep.run(sweep.Sweep(tmp_path, [asked(tmp_path, "a0"), asked(tmp_path, "b0")], **given))


def test_contrasts_cannot_change_when_runs_are_finished(finished, tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps({"contrasts": {}}))
    runs = [finished._replace(arm=arm) for arm in "ab"]
    settings = {"n": 1, "backend": "local", "slurm": {}, "contrasts": {"order": ["a", "b"]}, "overrides": []}
    with pytest.raises(UserError, match="declares other contrasts, and some of its runs are finished"):
        sweep.run(sweep.Sweep(tmp_path, runs, **settings))


@pytest.fixture
def multirun(toy, tmp_path, monkeypatch):
    """multirun(*overrides) starts a sweep on the toy in an empty folder and store."""
    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    shutil.copy(toy / "a.jsonl", tmp_path)
    base = ["-m", "model=local", f"model.path={toy / 'model'}", "data=local", "data.train=[a.jsonl]"]
    base += ["data.template=plain", "data.held_out_share=0.2", "launch.device=cpu", "hydra.sweep.dir=sweep"]

    def start(*overrides):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a child of `nohup ... &` would ignore Ctrl-C
        command = [sys.executable, str(CHECKOUT / "train.py"), *base, *overrides]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def test_a_key_of_swept_options_is_given_to_each(multirun):
    planned = multirun("split=random,stratified", "split.num_chunks=3", "plan=true")
    output, error = planned.communicate()
    assert planned.returncode == 0, error
    for split in ("random", "stratified"):  # one run of three steps each
        assert re.search(rf"^split={split} +1 +3 ", output, re.MULTILINE), output


def test_a_run_that_fails_is_named_and_it_alone_is_done_again(multirun, toy, tmp_path):
    arms = ["data.train=[a.jsonl]", "data.train=[later/a.jsonl]"]
    overrides = ["data.train=[a.jsonl],[later/a.jsonl]", f"+hydra.launcher.contrasts.files={json.dumps(arms)}"]
    first = multirun(*overrides)
    output, error = first.communicate()
    assert first.returncode == 1 and error.splitlines()[-1].startswith("error: 1 of 2 runs failed")
    assert "1 of 2 runs finished; 1 steps trained, 0 reused" in output
    (failed,) = (tmp_path / "sweep").glob("*/error.txt")
    sentence = failed.read_text().splitlines()[0]
    assert "later/a.jsonl" in sentence and f"failed: {failed.parent.name}: {sentence}" in output

    (tmp_path / "later").mkdir()
    shutil.copy(toy / "b.jsonl", tmp_path / "later" / "a.jsonl")
    (done,) = (tmp_path / "sweep").glob("*/done")
    before = done.stat().st_mtime_ns
    second = multirun(*overrides)
    output, error = second.communicate()
    assert (second.returncode, error) == (0, "")
    assert "2 of 2 runs finished; 1 steps trained, 1 reused" in output and done.stat().st_mtime_ns == before
    written = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert sorted(written["runs"]) == sorted(path.parent.name for path in (tmp_path / "sweep").glob("*/done"))
    assert written["contrasts"] == {"files": arms}
    manifest = json.loads((failed.parent / "manifest.json").read_text())
    assert (manifest["sweep"], manifest["arm"]) == ("sweep", arms[1])


SLOW = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGKILL, signal.SIGTERM)]


@pytest.mark.parametrize("ending", [signal.SIGINT, *SLOW])
def test_an_ended_sweep_leaves_no_run_behind(multirun, tmp_path, ending):
    parent = multirun("seed=0,1,2", "optim.epochs=3000", "hydra.launcher.n=2")
    metrics = (tmp_path / "sweep").glob
    wait_until(lambda: sum('"train"' in path.read_text() for path in metrics("*/metrics.jsonl")) == 2)
    running = children(parent.pid)
    parent.send_signal(ending)
    while ending is signal.SIGTERM and any(map(alive, running)):  # an impatient scheduler asks again and again
        for pid in filter(alive, running):
            os.kill(pid, ending)
        time.sleep(0.001)
    output, error = parent.communicate()
    wait_until(lambda: not any(map(alive, running)), 30)
    assert len(running) == 2
    if ending is signal.SIGINT:
        assert parent.returncode == 130 and "0 of 3 runs finished" in output
        assert error == "interrupted; the same command goes on from here\n"
    if ending is signal.SIGTERM:
        assert parent.returncode == STOPPED and "failed" not in error, error
        assert "0 of 3 runs finished" in output
        assert not list((tmp_path / "sweep").glob("*/error.txt"))
        assert len(list((tmp_path / "store" / "partial").glob("*/[0-9]*"))) == 2  # both running steps are saved


@pytest.mark.slow
def test_a_cluster_runs_what_was_submitted(multirun, tmp_path):
    submitted = multirun("seed=0,1", "hydra.launcher.backend=slurm", "hydra.launcher.slurm.cluster=local")
    output, error = submitted.communicate()
    assert submitted.returncode == 0 and "2 of 2 runs finished" in output, error
    assert all(line.startswith("sweep: 1 of 2 runs") for line in error.splitlines())  # progress, if it takes long


@pytest.mark.slow
def test_runs_are_forked_before_any_thread_starts():
    """If a process with threads forks, a lock that a thread holds is never released in the child."""
    imports = "from sdpo import distributed; distributed.set_threads(1); import os, sdpo.stepwise"
    count = f"{imports}; print(len(os.listdir('/proc/self/task')))"
    counted = subprocess.run([sys.executable, "-c", count], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert counted.stdout == "1\n"
