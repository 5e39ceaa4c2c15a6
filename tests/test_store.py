"""Artifacts: their keys, that each is made once and whole, and that a damaged one is refused."""

import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import random_model
from safetensors.torch import save_file

from sdpo.errors import UserError
from sdpo.model.hub import fingerprint
from sdpo.store import publishing
from sdpo.store.artifacts import Store, check, key_of


def build_text(text):
    return lambda folder: (folder / "text").write_text(text)


def in_child(work):
    """Run `work` in a forked process; returns its id."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child


def test_a_key_depends_on_content_and_kind_not_on_order():
    assert key_of("step", {"a": 1, "b": [2]}) == key_of("step", {"b": [2], "a": 1})
    assert len({key_of("step", {"a": 1}), key_of("step", {"a": 2}), key_of("score", {"a": 1})}) == 3


def test_the_same_determinants_are_built_once(tmp_path):
    store = Store(tmp_path)
    first = store.make("step", {"a": 1}, build_text("one"))
    again = store.make("step", {"a": 1}, build_text("two"))
    assert (first.reused, again.reused, again.folder) == (False, True, first.folder)
    assert (again.folder / "text").read_text() == "one"
    assert json.loads((again.folder / "manifest.json").read_text())["a"] == 1


def test_a_failed_build_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half").write_text("half")
        raise OSError("No space left on device")

    store = Store(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        store.make("step", {}, fail)
    assert list((tmp_path / "step").iterdir()) == []
    assert not store.make("step", {}, build_text("whole")).reused


def test_a_changed_file_is_refused(tmp_path):
    artifact = Store(tmp_path).make("step", {}, build_text("right"))
    check(artifact)
    (artifact.folder / "text").write_text("wrong")
    with pytest.raises(UserError, match=r"has changed since it was written \(text\)"):
        check(artifact)


@pytest.fixture
def held_up(monkeypatch):
    """Completing an artifact takes until this event is set."""
    event, settle = threading.Event(), publishing._settle

    def wait(folder):
        assert event.wait(60)
        return settle(folder)

    monkeypatch.setattr(publishing, "_settle", wait)
    return event


def test_a_thread_completes_an_artifact_which_has_no_name_before_it_is_whole(tmp_path, held_up):
    def wait_for_it():
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        Store(tmp_path).make("step", {}, lambda _: os._exit(1))

    child = in_child(wait_for_it)  # before the lock is taken, which it would inherit
    store, called = Store(tmp_path), []
    artifact = store.make("step", {}, build_text("one"), then=lambda: called.append(artifact.folder.exists()))
    (tmp_path / "started").touch()
    assert not artifact.reused and not artifact.folder.exists() and called == []
    time.sleep(0.3)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    held_up.set()
    store.join()
    assert os.waitpid(child, 0)[1] == 0
    assert called == [True]
    check(artifact)
    assert [path.name for path in artifact.folder.parent.iterdir()] == [artifact.folder.name]


def test_one_artifact_at_a_time_is_completed_in_a_thread(tmp_path, held_up):
    store, order = Store(tmp_path), []

    def build(folder):
        (folder / "text").write_text("two")
        order.append("built")
        held_up.set()

    store.make("step", {"a": 1}, build_text("one"), then=lambda: order.append("one is whole"))
    store.make("step", {"a": 2}, build, then=lambda: order.append("two is whole"))
    store.join()
    assert order == ["built", "one is whole", "two is whole"]


def test_what_goes_wrong_in_the_thread_is_raised_at_the_end_of_the_store(tmp_path, held_up):
    def refuse():
        raise OSError("No space left on device")

    held_up.set()
    with pytest.raises(OSError, match="No space left"), Store(tmp_path) as store:
        store.make("step", {}, build_text("one"), then=refuse)
    store.join()  # once


def test_a_signal_that_ends_the_wait_for_an_artifact_does_not_lose_it(tmp_path, held_up):
    def leave(*_):
        held_up.set()
        raise SystemExit

    before = signal.signal(signal.SIGALRM, leave)
    try:
        with pytest.raises(SystemExit), Store(tmp_path) as store:
            artifact = store.make("step", {}, build_text("one"), then=lambda: None)
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            store.join()
    finally:
        signal.signal(signal.SIGALRM, before)
    check(artifact)


def test_what_a_thread_completes_is_not_taken_for_abandoned(tmp_path, held_up, monkeypatch):
    """Without locks a run that has a step twice makes it twice, and does not touch what its own thread is hashing."""
    monkeypatch.setattr(fcntl, "flock", lambda file, operation: None)
    with Store(tmp_path) as store:
        artifact = store.make("step", {}, build_text("one"), then=lambda: None)
        assert not store.make("step", {}, lambda folder: held_up.set() or build_text("two")(folder)).reused
    check(artifact)
    assert (artifact.folder / "text").read_text() in ("one", "two")


def test_values_are_computed_once(tmp_path):
    store = Store(tmp_path)
    assert store.make_json("score", {}, lambda: {"a": 0.5}) == {"a": 0.5}
    assert store.make_json("score", {}, lambda: pytest.fail("computed again")) == {"a": 0.5}


def test_concurrent_runs_wait_for_the_one_that_builds(tmp_path):
    def slow(folder: Path):
        time.sleep(0.3)
        (folder / "text").write_text(str(os.getpid()))

    children = [in_child(lambda: Store(tmp_path).make("step", {}, slow)) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    artifact = Store(tmp_path).make("step", {}, lambda _: pytest.fail("built again"))
    assert int((artifact.folder / "text").read_text()) in children


def test_another_run_makes_the_artifact_of_a_killed_one(tmp_path):
    def hang(folder: Path):
        (folder / "half").write_text("half")
        (tmp_path / "started").touch()
        time.sleep(60)

    child = in_child(lambda: Store(tmp_path).make("step", {}, hang))
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    artifact = Store(tmp_path).make("step", {}, build_text("whole"))
    assert [path.name for path in sorted(artifact.folder.iterdir())] == ["manifest.json", "text"]
    assert [path.name for path in artifact.folder.parent.iterdir()] == [artifact.folder.name]  # no half folder is left


def test_without_locks_all_make_the_artifact_and_the_first_is_kept(tmp_path, monkeypatch):
    """A second process must not delete or replace the work of the first, which a reader may have begun to read."""
    monkeypatch.setattr(fcntl, "flock", lambda file, operation: None)

    def make(name, seconds):
        def build(folder: Path):
            (folder / "text").write_text(name)
            (tmp_path / name).touch()
            time.sleep(seconds)

        return lambda: Store(tmp_path / "store").make("step", {}, build)

    quick, slow = in_child(make("quick", 0.5)), in_child(make("slow", 1.5))
    assert [os.waitpid(child, 0)[1] for child in (quick, slow)] == [0, 0]
    assert (tmp_path / "quick").exists() and (tmp_path / "slow").exists()
    artifact = Store(tmp_path / "store").make("step", {}, lambda _: pytest.fail("built again"))
    assert (artifact.folder / "text").read_text() == "quick"
    check(artifact)
    assert [path.name for path in artifact.folder.parent.iterdir()] == [artifact.folder.name]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_disk_without_locks_is_said_once(tmp_path, monkeypatch, capsys, number):
    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    store = Store(tmp_path)
    assert not store.make("step", {"a": 1}, build_text("one")).reused
    assert not store.make("step", {"a": 2}, build_text("two")).reused
    assert capsys.readouterr().err.count(f"the disk of {tmp_path / 'locks'} has no locks") == 1


def test_who_is_waited_for_is_said(tmp_path, capfd):
    def hang(folder: Path):
        (tmp_path / "started").touch()
        time.sleep(0.5)

    child = in_child(lambda: Store(tmp_path).make("step", {}, hang))
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    artifact = Store(tmp_path).make("step", {}, build_text("another"))
    os.waitpid(child, 0)
    said = f"waiting for process {child} on {socket.gethostname()}, which makes step {artifact.key[:16]}"
    assert said in capfd.readouterr().err


def test_the_group_may_read_what_the_umask_lets_it_read(tmp_path):
    def build(folder: Path):
        save_file({"a": torch.zeros(1)}, folder / "a.safetensors")
        (folder / "a.safetensors").chmod(0o600)

    artifact = Store(tmp_path).make("step", {}, build)
    modes = {path.name: path.stat().st_mode & 0o777 for path in artifact.folder.iterdir()}
    assert modes["a.safetensors"] == modes["manifest.json"] == artifact.folder.stat().st_mode & 0o666


def test_an_incomplete_folder_in_the_place_of_an_artifact_is_named(tmp_path):
    store = Store(tmp_path)
    folder = store.folder("step", key_of("step", {}))
    folder.mkdir(parents=True)
    (folder / "text").write_text("half")
    with pytest.raises(UserError, match=f"{folder} is incomplete; remove it"):
        store.make("step", {}, build_text("whole"))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_model_made_elsewhere_is_known_by_all_that_it_carries(tmp_path):
    random_model().save_pretrained(tmp_path)
    known = fingerprint(tmp_path)
    (tmp_path / "moments-0.safetensors").write_bytes(b"of an optimiser, beside a finished step")
    assert fingerprint(tmp_path) == known
    (tmp_path / "README.md").write_text("a card")
    assert fingerprint(tmp_path) == known
    carried = ["modeling_own.py", "generation_config.json", "chat_template.jinja", "tokenizer.json", "vocab.txt"]
    carried += ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"]
    for name in [*carried, "additional_chat_templates/tools.jinja"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"another {name}")
        assert fingerprint(tmp_path) != known, name
        known = fingerprint(tmp_path)


def test_a_file_in_place_of_the_store_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "file" / "store"))
    with pytest.raises(UserError, match="file is a file, and steps are stored in folders; set SDPO_STORE to a folder"):
        Store()
