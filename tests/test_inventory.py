"""What the store holds: listed, verified, and removed if no run needs it."""

import json
import os

import pytest
from test_faults import DAMAGES

from sdpo.errors import UserError
from sdpo.store import inventory
from sdpo.store.artifacts import Store


@pytest.fixture
def finished(run, tmp_path, monkeypatch):
    """A finished run of three steps, another one that shares its first step and was removed, and their store."""
    settings = ["split=by_source", "evaluate=[preference]"]
    folder = run(*settings)
    other = run(*settings, "steps.2.optim.lr=1e-3", name="other")
    other.rename(tmp_path.parent / f"{tmp_path.name}-removed")
    (folder / "done").touch()
    return folder, Store()


def steps_of(store):
    return {one.key for one in inventory.entries(store) if one.kind == "step"}


def keys_of(folder):
    return [step["key"] for step in json.loads((folder / "manifest.json").read_text())["steps"]]


def test_what_no_run_needs_is_listed_and_then_removed(finished, tmp_path):
    folder, store = finished
    whole, kept = inventory.list_entries(store, []), keys_of(folder)
    assert len(steps_of(store)) == 5 and all(key[:16] in whole for key in kept)
    said = inventory.prune(store, [tmp_path / "run"], "all", abandon=False, confirmed=False)
    assert "can be removed: add --yes" in said and inventory.list_entries(store, []) == whole
    named = {line.split()[1] for line in inventory.list_entries(store, [folder]).splitlines() if line.endswith(" run")}
    assert {key[:16] for key in kept} <= named and not named & {key[:16] for key in steps_of(store) - set(kept)}
    inventory.prune(store, [tmp_path / "run"], "all", abandon=False, confirmed=True)
    assert steps_of(store) == set(kept)
    # Nothing that the run's models were measured with is lost.
    again = inventory.prune(store, [tmp_path / "run"], "all", abandon=False, confirmed=False)
    assert again == "0.00 MB can be removed: add --yes"
    inventory.verify(store)


@pytest.mark.parametrize(("keep", "left"), [("last", [3]), ("1,3", [1, 3])])
def test_a_run_can_keep_some_of_its_models(finished, tmp_path, keep, left):
    folder, store = finished
    keys = keys_of(folder)
    inventory.prune(store, [tmp_path], keep, abandon=False, confirmed=True)
    assert steps_of(store) == {keys[t - 1] for t in left}
    assert sorted(int(link.name) for link in folder.glob("steps/*")) == left
    inventory.verify(store)


def test_a_run_that_is_not_finished_is_not_robbed(finished, tmp_path):
    folder, store = finished
    (folder / "done").unlink()
    with pytest.raises(UserError, match="run is not finished: finish it, or add --abandon"):
        inventory.prune(store, [tmp_path], "all", abandon=False, confirmed=True)
    with pytest.raises(UserError, match="no run folder in .*store"):
        inventory.prune(store, [store.root], "all", abandon=True, confirmed=True)
    assert len(steps_of(store)) == 5


def test_leftovers_are_found_and_a_changed_file_is_named(finished):
    folder, store = finished
    new, old, done = (store.root / "partial" / name for name in ("0" * 16, "1" * 16, keys_of(folder)[0][:16]))
    for path in (new, old, done):
        path.mkdir(parents=True)
    os.utime(old, (0, 0))
    (store.root / "step" / "tmp-gone").symlink_to("gone")  # as a folder that a run has renamed since it was listed
    assert {one.folder for one in inventory.leftovers(store)} == {old, done}
    with (store.folder("step", keys_of(folder)[1]) / "train.json").open("a") as file:
        file.write(" ")
    with pytest.raises(UserError, match=f"1 artifacts have changed: .*{keys_of(folder)[1][:16]}"):
        inventory.verify(store)


@pytest.fixture
def stored(run):
    """The store of a run of three steps, and the bytes of its files."""
    run("split=by_source", "evaluate=[]")
    store = Store()
    return store, {path: path.read_bytes() for path in store.root.glob("*/[0-9a-f]*/*")}


def damaged(path, files, damage):
    """The bytes of a damaged file, or of its like in another artifact; None if all others are equal."""
    others = [other for other in files if other.name == path.name and files[other] != files[path]]
    return DAMAGES[damage](files[path], files[others[0]] if others else None)


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damaged_file_is_named_by_verify(stored, damage):
    store, files = stored
    for path, content in files.items():
        changed = damaged(path, files, damage)
        if changed is not None:
            path.write_bytes(changed)
            with pytest.raises(UserError, match=str(path.parent)):
                inventory.verify(store)
            path.write_bytes(content)
    assert inventory.verify(store) == f"{len(inventory.entries(store))} artifacts are what was stored"


def test_two_artifacts_that_were_swapped_are_named(stored):
    store, _ = stored
    first, second, _ = store.root.glob("step/*")
    first.rename(first.with_name("aside"))
    second.rename(first)
    first.with_name("aside").rename(second)
    with pytest.raises(UserError, match=f"2 artifacts have changed: {first}, {second}|{second}, {first}"):
        inventory.verify(store)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_that_needs_a_damaged_file_is_refused(stored, run, tmp_path, damage):
    """It would train its second step from M_1 of the first run, with other settings."""
    _, files = stored
    first = (tmp_path / "run" / "steps" / "1").resolve()
    tables = (path for path in files if path.name == "logprobs.parquet" and is_under(path, first))
    table = max(tables, key=lambda path: len(files[path]))  # of the second chunk
    names = ("manifest.json", "train.json", "reference.parquet", "model.safetensors")
    for path in [*(first / name for name in names), table]:
        path.write_bytes(damaged(path, files, damage))
        with pytest.raises(UserError, match=f"{path.parent}.* (has changed since it was written|cannot be read)"):
            run("split=by_source", "evaluate=[]", "steps.2.optim.lr=1e-3", name="other")
        path.write_bytes(files[path])


def is_under(table, model):
    """Whether a table has the log-probs of rows under a model."""
    key = json.loads((model / "manifest.json").read_text())["key"]
    return json.loads((table.parent / "manifest.json").read_text())["weights"] == key
