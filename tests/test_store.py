"""Artifacts: their keys, that each is made once and whole, and that a damaged one is refused."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from conftest import random_model

from sdpo.errors import UserError
from sdpo.model.hub import fingerprint
from sdpo.store import Store, check, key_of


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
