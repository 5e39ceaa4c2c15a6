"""data.held_out_sets: more held-out pairs, each set measured under its own name and beside the headline."""

import json

import pytest
from conftest import read_lines

from sdpo import config
from sdpo.data import preferences
from sdpo.errors import UserError
from sdpo.run import folder as run_folder


def rows(*numbers):
    return [{"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": f"No, not {i}!"} for i in numbers]


def write(path, some):
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return str(path)


@pytest.fixture
def files(tmp_path):
    return {name: write(tmp_path / f"{name}.jsonl", rows(*numbers)) for name, numbers in SETS.items()}


SETS = {"one": range(4), "two": range(4, 6), "three": range(6, 7), "train": range(3, 20)}


def test_no_step_trains_on_the_prompts_of_a_set(files):
    sets = {"easy": [files["two"], files["three"]], "hard": [files["one"]]}
    found = preferences.load(
        config.Data("local", train=[files["train"]], held_out_sets=sets, held_out_share=0, on_bad_row="skip")
    )
    assert {name: len(pairs) for name, pairs in found.held_out_sets.items()} == {"easy": 3, "hard": 4}
    assert len(found.train) == 17 - 4 and found.report["dropped"] == {"held_out_prompt": 4}
    assert found.report["sources"]["held_out_sets.easy"]["two"]["pairs"] == 2


@pytest.mark.parametrize("sets", [{"a/b": ["one.jsonl"]}, {"empty": []}])
def test_a_set_has_files_and_a_name_that_can_be_part_of_a_measure(sets):
    with pytest.raises(UserError, match="a set needs a name without '/' and at least one file"):
        preferences.load(config.Data("local", train=["train.jsonl"], held_out_sets=sets))


def test_each_set_has_its_measures_and_the_headline_stays(run, files):
    """A set changes no key, so both runs have one artifact."""
    plain = run("split=all_at_once", "evaluate=[preference]", "data.held_out_share=0.1", name="plain")
    sets = f"+data.held_out_sets={{odd:[{files['one']},{files['two']}],single:[{files['three']}]}}"
    with_sets = run("split=all_at_once", "evaluate=[preference]", "data.held_out_share=0.1", sets, name="with_sets")
    assert (plain / "steps" / "1").resolve() == (with_sets / "steps" / "1").resolve()
    (before, after), (start, trained) = (read_lines(folder, "eval") for folder in (plain, with_sets))
    added = {name: measure for name, measure in trained["eval"].items() if name not in after["eval"]}
    assert trained["eval"] == after["eval"] | added and start["eval"].items() >= before["eval"].items()
    names = ("ranking_accuracy", "reward_accuracy_initial", "gamma", "shorter_accuracy")
    assert set(added) == {f"held_out/{key}/{name}" for key in ("odd", "single") for name in names}
    assert [added[f"held_out/{key}/gamma"]["n"] for key in ("odd", "single")] == [6, 1]
    assert added["held_out/odd/shorter_accuracy"]["value"] == 1  # "No, not 4!" has more tokens than "Yes, 4."
    assert start["eval"]["held_out/odd/reward_accuracy_initial"]["value"] is None


def test_a_run_with_an_edited_set_is_not_a_finished_one(files):
    settings = config.Config(data=config.Data("local", held_out_sets={"a": [files["one"]]}))
    before = run_folder.stamp(settings)
    write(run_folder.Path(files["one"]), rows(50))
    assert run_folder.stamp(settings) != before
