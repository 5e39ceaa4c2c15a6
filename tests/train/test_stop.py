"""A run that is asked to stop in the middle of a step saves its last update and ends with a code of its own."""

import os
import signal
from pathlib import Path

import pytest
import ranks
from conftest import compose, read_lines
from processes import wait_until

from sdpo import distributed
from sdpo.model import engine
from sdpo.store import artifacts as store

QUICK = ["split=all_at_once", "optim.epochs=2"]


def weights(folder):
    return (folder / "steps" / "1" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2", "SIGHUP"])
def test_a_signal_in_an_update_loses_no_update(run, monkeypatch, tmp_path, capsys, request, name):
    number, update, done = getattr(signal, name), engine.Plain.update, []
    before = signal.signal(number, signal.SIG_DFL)  # a child of `nohup` would ignore SIGHUP
    request.addfinalizer(lambda: signal.signal(number, before))

    def signalled(self, lr):
        done.append(lr)
        if len(done) == 4:
            os.kill(os.getpid(), number)
        return update(self, lr)

    monkeypatch.setattr(engine.Plain, "update", signalled)
    with pytest.raises(SystemExit) as stopped:
        run(*QUICK)
    assert stopped.value.code == distributed.STOPPED == 85 and len(done) == 4
    assert "asked to stop: update 4 is saved" in capsys.readouterr().err
    assert signal.getsignal(number) == signal.SIG_DFL
    resumed = run(*QUICK)
    assert len(done) == len(read_lines(resumed, "train"))
    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "another"))
    assert weights(resumed) == weights(run(*QUICK, name="whole"))


def test_a_signal_after_the_last_update_lets_the_step_be_stored(run, monkeypatch):
    from sdpo.model import hub

    save = hub.save

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(hub, "save", signalled)
        with pytest.raises(SystemExit):
            run(*QUICK)
    monkeypatch.setattr(engine.Plain, "update", lambda self, lr: pytest.fail("trained again"))
    run(*QUICK)  # the signal was for the run before


def test_a_run_that_waits_for_another_one_s_step_ends_at_once(run, monkeypatch):
    def refuse(file):
        if not Path(file.name).name.startswith("step-"):
            return True
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal was held back")

    def ended(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, ended)
    monkeypatch.setattr(store, "try_lock", refuse)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(*QUICK)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with distributed.stops_deferred():
            os.kill(os.getpid(), signal.SIGHUP)
        assert not distributed.stop_requested() and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["off", "zero3"])
def test_one_of_two_ranks_is_asked_and_both_save(toy, tmp_path, stage):
    overrides = ["launch.ranks=2", "launch.device=cpu", f"deepspeed={stage}"]
    overrides += ["data=local", f"data.train=[{toy / 'a.jsonl'},{toy / 'b.jsonl'}]", "data.template=plain"]
    overrides += ["model=local", f"model.path={toy / 'model'}", "evaluate=[]", "split=all_at_once"]
    config = compose(*overrides, "optim.lr=3e-3", "optim.pairs_per_update=8", "optim.epochs=20")

    def start(folder):
        return ranks.start(config, folder / "run", folder / "store")

    def trained():
        metrics = tmp_path / "run" / "metrics.jsonl"
        return metrics.read_text().count('"train"') if metrics.exists() else 0

    both = start(tmp_path)
    wait_until(lambda: trained() > 5)
    os.kill(both[1].pid, signal.SIGTERM)
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [distributed.STOPPED] * 2
    assert "is saved, and the same command goes on from there" in (tmp_path / "run" / "rank-0.txt").read_text()
    (kept,) = tmp_path.glob("store/partial/*/[0-9]*")
    assert 5 < int(kept.name) == trained() < 120
    for folder in (tmp_path, tmp_path / "whole"):
        ranks.finish(folder / "run", start(folder))
    assert weights(tmp_path / "run") == weights(tmp_path / "whole" / "run")
