"""Faults, injected for real: interrupted steps, poisoned and swapped files, a full disk, a diverging loss."""

import json
import re
import resource
import shutil
import threading
import time

import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import random_model, read_lines
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sdpo.errors import UserError, disk_as_user_error
from sdpo.model import engine
from sdpo.run import folder as run_folder
from sdpo.store import artifacts as store
from sdpo.store import publishing
from sdpo.store.hashing import hash_files

RULES = {
    "previous": [],
    "periodic": ["reference=periodic", "reference.updates=4"],
    "mixed": ["reference=mixed", "reference.updates=4", "reference.alpha=0.6"],
    "until_kl": ["reference=until_kl", "reference.bound=1e-12"],
}


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


CHAT = "{% for m in messages %}{{ m.role[0] + ':' + m.content + (eos_token if m.role == 'assistant' else '') + '\n' }}"
CHAT += "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"


def interrupt_after(monkeypatch, num_updates):
    """The process ends after some optimiser updates; returns the list that counts them."""
    done, update = [], engine.Plain.update

    def counted(self, lr):
        if len(done) == num_updates:
            raise Killed
        done.append(lr)
        return update(self, lr)

    monkeypatch.setattr(engine.Plain, "update", counted)
    return done


def final_bytes(folder, t=1):
    return (folder / "steps" / str(t) / "model.safetensors").read_bytes()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cache", [pytest.param("kept", marks=pytest.mark.slow), "deleted"])
def test_an_interrupted_step_continues_to_the_same_bytes(run, monkeypatch, tmp_path, rule, cache):
    """T10: under all rules but `previous` the reference has moved when the step is killed."""
    overrides = ["split=all_at_once", "optim.epochs=2", "launch.checkpoint_minutes=0", "probe.every=5", *RULES[rule]]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6)
        with pytest.raises(Killed):
            run(*overrides)
    if cache == "deleted":
        shutil.rmtree(tmp_path / "store" / "logprobs")
    done = interrupt_after(monkeypatch, 99)
    resumed = run(*overrides)
    assert len(done) == len(read_lines(resumed, "train")) - 6
    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "another"))
    whole = run(*overrides, name="whole")
    assert final_bytes(resumed) == final_bytes(whole)
    losses = [[entry["loss"] for entry in read_lines(folder, "train")] for folder in (resumed, whole)]
    assert losses[0] == losses[1]
    followed = [pd.read_parquet(folder / "trajectory.parquet") for folder in (resumed, whole)]
    pd.testing.assert_frame_equal(*followed)


def test_a_later_step_with_carried_moments_and_an_average_reference_continues_to_the_same_bytes(
    run, monkeypatch, tmp_path
):
    overrides = ["reference=average", "optim.moments=carry", "launch.checkpoint_minutes=0"]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)  # 3 updates a step
        with pytest.raises(Killed):
            run(*overrides)
    resumed = run(*overrides)
    assert [entry["reused"] for entry in read_lines(resumed, "step")] == [True, False, False]
    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "another"))
    whole = run(*overrides, name="whole")
    assert final_bytes(resumed, 3) == final_bytes(whole, 3)


def chunk_table(store):
    """The largest table of log-probs: a whole chunk's."""
    return max(store.glob("logprobs/*/logprobs.parquet"), key=lambda path: path.stat().st_size)


def poison(table, row):
    columns = pq.read_table(table).to_pandas()
    columns.loc[row, "chosen"] += 0.5
    columns.to_parquet(table)
    return columns.loc[row, "id"]


def test_a_poisoned_log_prob_stops_the_run_and_names_the_row(run, tmp_path):
    run("split=all_at_once")
    wrong = poison(chunk_table(tmp_path / "store"), 5)
    with pytest.raises(UserError, match=f"other log-probs for {re.escape(wrong)};"):
        run("split=all_at_once", "loss.beta=0.2")


def test_a_stale_table_under_a_right_hash_is_caught_by_the_audit(run, tmp_path):
    """T6: numbers of something else under the key of this."""
    run("split=all_at_once")
    table = chunk_table(tmp_path / "store")
    for row in range(len(pq.read_table(table))):
        poison(table, row)
    manifest = json.loads((table.parent / "manifest.json").read_text())
    manifest["files"] = hash_files(table.parent, [table])
    (table.parent / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"the reference log-probs of row \S+ are"):
        run("split=all_at_once", "loss.beta=0.2")


DAMAGES = {  # what a file may hold after a machine lost power, or after a wrong copy; `other` is its like elsewhere
    "truncated": lambda content, other: content[: len(content) // 2],
    "zeroed": lambda content, other: content[:-40] + bytes(40),
    "swapped": lambda content, other: other,
}
IN_CHECKPOINT = ["masters-0.safetensors", "moments-0.safetensors", "reference.safetensors", "log.json", "manifest.json"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [*((name, "zeroed") for name in IN_CHECKPOINT), ("masters-0.safetensors", "truncated"), ("log.json", "swapped")],
)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_goes_on(run, monkeypatch, tmp_path, capsys, name, damage):
    """No gate would notice it later."""
    overrides = ["split=all_at_once", "launch.checkpoint_minutes=0"]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(Killed):
            run(*overrides)
    before, newest = sorted((tmp_path / "store").glob("partial/*/*"))
    assert [folder.name for folder in (before, newest)] == ["00000002", "00000003"]
    (newest / name).write_bytes(DAMAGES[damage]((newest / name).read_bytes(), (before / name).read_bytes()))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)  # the second of these updates is the third again
        with pytest.raises(Killed):
            run(*overrides)
    assert store.differing(newest) == []
    done = interrupt_after(monkeypatch, 99)
    resumed = run(*overrides)
    assert f"{newest / name} has changed since it was written; not going on from there" in capsys.readouterr().err
    assert len(done) == len(read_lines(resumed, "train")) - 4
    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "another"))
    assert final_bytes(resumed) == final_bytes(run(*overrides, name="whole"))


def test_a_step_without_a_whole_checkpoint_is_refused(run, monkeypatch, tmp_path):
    overrides = ["split=all_at_once", "launch.checkpoint_minutes=0"]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(Killed):
            run(*overrides)
    for table in (tmp_path / "store").glob("partial/*/*/reference.safetensors"):
        kept = load_file(table)
        kept["logps"][5, 0] += 0.5
        save_file(kept, table)
    with pytest.raises(UserError, match=r"no checkpoint in \S+ is as it was written; remove that folder"):
        run(*overrides)


def test_a_step_that_is_killed_while_it_is_hashed_goes_on_from_its_last_checkpoint(run, monkeypatch, tmp_path):
    overrides = ["split=all_at_once", "launch.checkpoint_minutes=0"]

    def killed(folder, paths):
        if any(path.name == "train.json" for path in paths):
            raise Killed
        return hash_files(folder, paths)

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "hash_files", killed)
        with pytest.raises(Killed):
            run(*overrides)
    done = interrupt_after(monkeypatch, 99)
    resumed = run(*overrides)
    assert done == [] and len(read_lines(resumed, "train")) > 3
    assert list((tmp_path / "store" / "partial").iterdir()) == []


def test_a_step_that_is_killed_while_it_is_hashed_and_the_next_one_trains_is_trained_to_the_same_bytes(
    run, monkeypatch, tmp_path
):
    """M_1 has no name yet. Its last checkpoint is still there, and step 2 has none, which would need M_1."""
    overrides = ["split=by_source", "launch.checkpoint_minutes=0"]
    begun = threading.Event()

    def killed(folder, paths):
        if any(path.name == "train.json" for path in paths):
            begun.set()
            assert wait_for(lambda: len(done) == 4)
            raise Killed
        return hash_files(folder, paths)

    with monkeypatch.context() as patch:
        done = interrupt_after(patch, 4)
        patch.setattr(publishing, "hash_files", killed)
        with pytest.raises(Killed):
            run(*overrides)
    assert begun.is_set() and not list((tmp_path / "store" / "step").glob("[0-9a-f]*"))
    done = interrupt_after(monkeypatch, 99)
    resumed = run(*overrides)
    assert len(done) == len(read_lines(resumed, "train")) - 3  # all of step 1
    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "another"))
    whole = run(*overrides, name="whole")
    assert [final_bytes(resumed, t) for t in (1, 2, 3)] == [final_bytes(whole, t) for t in (1, 2, 3)]


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_reference_log_probs_that_changed_in_a_finished_step_are_not_read(run, tmp_path):
    run("split=all_at_once")
    (table,) = (tmp_path / "store").glob("step/*/reference.parquet")
    poison(table, 5)
    with pytest.raises(UserError, match=r"has changed since it was written \(reference.parquet\)"):
        run("split=all_at_once", name="again")


def test_a_checkpoint_swapped_behind_its_path_is_another_model(run, toy):
    first = run(name="first")
    weights = toy / "model" / "model.safetensors"
    original = weights.read_bytes()
    try:
        random_model(seed=1).save_pretrained(toy / "model")
        second = run(name="second")
    finally:
        weights.write_bytes(original)
    assert json.loads((second / "summary.json").read_text())["reused_steps"] == 0
    starts = [read_lines(folder, "train")[0] for folder in (first, second)]
    assert starts[0]["chosen_logp"] != starts[1]["chosen_logp"]
    assert [start["margin"] for start in starts] == [0.0, 0.0]


def test_a_repaired_chat_template_trains_and_exports_anew(run, toy):
    def exported(name):
        folder = run("split=all_at_once", "optim.pairs_per_update=99", "data.template=null", name=name)
        assert json.loads((folder / "summary.json").read_text())["reused_steps"] == 0
        return (folder / "steps/1/chat_template.jinja").read_text()

    template = toy / "model" / "chat_template.jinja"
    try:
        template.write_text(CHAT)
        assert exported("first") == CHAT
        template.write_text(CHAT + "{# repaired #}")
        assert exported("second") == CHAT + "{# repaired #}"
    finally:
        template.unlink()


def test_tokens_that_changed_are_scored_anew(run):
    """T4: another length limit."""
    first = run(name="first")
    second = run("data.max_tokens=40", "data.on_long=truncate_prompt", name="second")
    keys = [json.loads((folder / "manifest.json").read_text())["steps"][0]["key"] for folder in (first, second)]
    assert keys[0] != keys[1]
    assert read_lines(second, "train")[0]["margin"] == 0.0


def test_a_full_disk_leaves_the_store_valid(run, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # bytes; a model of the toy has 140,000
    try:
        with pytest.raises(UserError, match="File too large; raise the limit.*start the same"), disk_as_user_error():
            run("split=all_at_once")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "store" / "step").iterdir())
    assert read_lines(run("split=all_at_once"), "step")[0]["reused"] is False


def test_a_full_disk_is_one_sentence_in_a_run_s_folder_too(tmp_path):
    """From there the parent of several ranks, and a sweep, read why a run failed."""
    run_folder.fail(tmp_path, SafetensorError("Error while serializing: I/O error: No space left (os error 28)"))
    sentence = run_folder.failure(tmp_path)
    assert sentence == "No space left on device; free some space, then start the same command again"


def test_a_diverging_step_stops_with_its_update_and_rows(run):
    with pytest.raises(UserError, match=r"update \d+: .* is not finite; its pairs are \w+-"):
        run("split=all_at_once", "optim.lr=1e30", "optim.epochs=3", "optim.clip=1e30")
