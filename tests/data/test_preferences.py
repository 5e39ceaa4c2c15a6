"""Files become pairs: the same in every format, split by prompt, with every bad row named or counted."""

import csv
import json
from collections import Counter
from dataclasses import replace

import pyarrow
import pytest
from pyarrow import parquet

from sdpo import config
from sdpo.data import preferences
from sdpo.errors import UserError

ROWS = [{"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": f"No, not {i}!"} for i in range(40)]


def write(path, rows):
    """Rows in the format of the file's suffix; text stands for a line that is no JSON."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def load(*train, **settings):
    return preferences.load(config.Data(name="local", train=list(train), **settings))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_formats_agree(tmp_path, suffix):
    name = write(tmp_path / f"easy.train.{suffix}", ROWS)
    train, held_out, report, _ = load(name, held_out_share=0)
    assert [pair.chosen for pair in train] == [row["chosen"] for row in ROWS] and not held_out
    assert {pair.source for pair in train} == {"easy"}
    assert train[0].id == "easy-13cc5007ad940143"  # of the content, in every format, file and order
    (file,) = report["files"]
    assert (file["rows"], file["layouts"], file["dropped"]) == (40, {"plain": 40}, {})
    assert len(file["sha256"]) == 64


def test_held_out_prompts(tmp_path):
    repeated = [row | {"chosen": f"Certainly, {i}."} for i, row in enumerate(ROWS)]
    name = write(tmp_path / "a.jsonl", ROWS + repeated)
    train, held_out, _, _ = load(name, held_out_share=0.1)
    assert (len(train), len(held_out)) == (72, 8)  # 4 of 40 prompts, each with both of its pairs
    assert not {preferences.prompt_key(p.prompt) for p in train} & {preferences.prompt_key(p.prompt) for p in held_out}
    backwards = write(tmp_path / "a.backwards.jsonl", (ROWS + repeated)[::-1])
    assert set(map(repr, load(backwards, held_out_share=0.1).held_out)) == set(map(repr, held_out))
    assert load(name, held_out_share=0.1, seed=1).held_out != held_out
    assert len(load(name, held_out_share=1e-9).held_out) == 2


def test_a_given_held_out_prompt_is_not_trained_on(tmp_path):
    name, held = write(tmp_path / "a.train.jsonl", ROWS), write(tmp_path / "a.eval.jsonl", ROWS[:3])
    with pytest.raises(
        UserError, match=r"a.train.jsonl, row 1: field 'prompt' is held out too, in .*eval.jsonl, row 1"
    ):
        load(name, held_out=[held])
    train, held_out, report, _ = load(name, held_out=[held], on_bad_row="skip")
    assert (len(train), len(held_out), report["dropped"]) == (37, 3, {"held_out_prompt": 3})


def test_report(tmp_path):
    rows = [
        {"prompt": "ab", "chosen": "abcd", "rejected": "abc", "score_chosen": 2, "score_rejected": 1},
        {"prompt": "ab", "chosen": "ab", "rejected": "abcde"},
        {"prompt": "abcde", "chosen": "a", "rejected": "b"},
        {"prompt": "ab", "chosen": "ab", "rejected": "abcde"},
    ]
    train, _, report, _ = load(write(tmp_path / "a.jsonl", rows), held_out_share=0)
    assert report["sources"]["train"]["a"] == {
        "pairs": 4,
        "prompts": 2,
        "duplicates": 1,
        "rated": 1,
        "prompt_chars": 2.75,
        "chosen_chars": 2.25,
        "rejected_chars": 3.5,
        "chosen_longer": 0.25,
    }
    assert train[3].id == train[1].id + "-2"
    assert json.loads(json.dumps(report)) == report


BAD_ROWS = {
    "invalid_json": ('{"prompt": "x",', "row 2: is not valid JSON"),
    "missing_column": ({"prompt": "x", "chosen": "y"}, "row 2: field 'rejected' is missing"),
    "empty": (ROWS[1] | {"chosen": " "}, "row 2: field 'chosen' is empty"),
    "not_text": (ROWS[1] | {"chosen": 7}, "row 2: field 'chosen' is int, not text"),
    "identical": (ROWS[1] | {"rejected": ROWS[1]["chosen"]}, "row 2: field 'rejected' equals 'chosen'"),
    "duplicate_id": (ROWS[1] | {"id": "first"}, "row 2: field 'id' 'first' was used before, by .*a.jsonl, row 1"),
    "invalid_utf8": ('{"prompt": "x", "chosen": "\\ud800", "rejected": "z"}', "row 2: field 'chosen' is not valid"),
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_bad_rows(tmp_path, reason):
    row, sentence = BAD_ROWS[reason]
    name = write(tmp_path / "a.jsonl", [ROWS[0] | {"id": "first"}, row, ROWS[2]])
    with pytest.raises(UserError, match=f"a.jsonl, {sentence}.*data.on_bad_row=skip"):
        load(name)
    train, _, report, _ = load(name, on_bad_row="skip", held_out_share=0)
    assert len(train) == 2 and report["dropped"] == report["files"][0]["dropped"] == {reason: 1}
    (dropped,) = report["dropped_rows"]
    assert (dropped["file"], dropped["row"], dropped["reason"]) == (name, 2, reason)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_invalid_bytes_are_found_in_their_field(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    write(path, ROWS)
    path.write_bytes(path.read_bytes().replace(b"Yes, 3.", b"Y\xff"))
    with pytest.raises(UserError, match=r"row 4: field 'chosen' is not valid UTF-8"):
        load(str(path))
    assert load(str(path), on_bad_row="skip").report["dropped"] == {"invalid_utf8": 1}


def test_columns_and_sources_of_rows(tmp_path):
    rows = [{"n": i, "topic": "ab"[i % 2], "ask": f"Why {i}?", "good": "a", "bad": "b"} for i in range(4)]
    columns = {"id": "n", "source": "topic", "prompt": "ask", "chosen": "good", "rejected": "bad"}
    name = write(tmp_path / "odd.jsonl", rows)
    train = load(name, columns=columns, source_from="row", held_out_share=0).train
    assert [(pair.id, pair.source) for pair in train] == [("0", "a"), ("1", "b"), ("2", "a"), ("3", "b")]
    name = write(tmp_path / "odd.jsonl", [*rows, rows[0] | {"n": 9, "good": ""}])
    with pytest.raises(UserError, match="row 5: field 'good' is empty"):
        load(name, columns=columns)


SETTINGS = [
    ({"held_out_share": 1.0}, "no training pair is left; lower data.held_out_share"),
    ({"columns": {"answer": "x", "chosen": "a", "rejected": "b"}}, "data.columns has answer"),
    ({"columns": {"prompt": "x"}}, "chosen and rejected among them"),
    ({"name": "hub", "revisions": {"a/b": "main"}}, "data.revisions names a/b"),
    ({"train": ["a.jsonl", "a.jsonl"]}, "a.jsonl twice"),
    ({"train": ["easy/a.jsonl", "hard/a.v2.jsonl"]}, "easy/a.jsonl and hard/a.v2.jsonl would both be the source 'a'"),
    ({"name": "hub", "train": ["x/a", "y/a:test"]}, "x/a and y/a:test would both be the source 'a'"),
    ({"train": ["nowhere.jsonl"]}, "nowhere.jsonl: cannot be read"),
    ({"train": ["a.txt"]}, "a.txt: files of this kind are not read; use one of .jsonl, .json, .parquet, .csv"),
    ({"source_from": "row"}, "row 1: field 'source' is missing"),
]


@pytest.mark.parametrize(("settings", "sentence"), SETTINGS)
def test_settings_that_cannot_work(tmp_path, settings, sentence):
    settings = {"name": "local", "train": [write(tmp_path / "a.jsonl", ROWS)]} | settings
    with pytest.raises(UserError, match=sentence):
        preferences.load(config.Data(**settings))


@pytest.mark.parametrize("content", [b"", b"PAR1 but not really", b"[1, 2"])
@pytest.mark.parametrize("suffix", ["json", "parquet", "csv"])
def test_broken_files(tmp_path, content, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"a.{suffix}"):
        load(str(path), on_bad_row="skip")


def test_hub(monkeypatch):
    import datasets

    calls = []

    def load_dataset(*names, **settings):
        calls.append((*names, settings))
        rows = ROWS[:20] if settings["split"].startswith("train") else ROWS[20:25]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings = config.Data(
        name="hub",
        train=["owner/one", "owner/two/easy:train[5:]"],
        held_out=["owner/one:test"],
        revisions={"owner/one": "v1"},
    )
    train, held_out, report, _ = preferences.load(settings)
    assert calls == [
        ("owner/one", None, {"split": "test", "revision": "v1"}),
        ("owner/one", None, {"split": "train", "revision": "v1"}),
        ("owner/two", "easy", {"split": "train[5:]", "revision": None}),
    ]
    assert {pair.source for pair in train} == {"one", "two-easy"} and len(held_out) == 5
    assert report["files"][0]["sha256"] != report["files"][1]["sha256"]


def test_a_limit_reads_the_first_rows_of_every_file(tmp_path):
    files = [write(tmp_path / f"{name}.jsonl", ROWS[start:]) for name, start in (("a", 0), ("b", 20))]
    prompts = [pair.prompt[-1]["content"] for pair in load(*files, held_out_share=0, limit=2).train]
    assert prompts == [f"Question {i}?" for i in (0, 1, 20, 21)]
    for most, expected in ((1, [30]), (0, [30, 31])):
        settings = {"held_out": [write(tmp_path / "c.jsonl", ROWS[30:])], "limit": 2, "held_out_limit": most}
        held_out = load(*files, **settings).held_out
        assert [pair.prompt[-1]["content"] for pair in held_out] == [f"Question {i}?" for i in expected]


def test_several_splits_of_one_data_set_are_several_sources(monkeypatch):
    import datasets

    halves = {"first": ROWS[:20], "second": ROWS[20:30], "test": ROWS[30:33]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split, **__: datasets.Dataset.from_list(halves[split]))
    names = ["owner/one:first", "owner/one:second"]
    train, held_out, _, _ = preferences.load(config.Data(name="hub", train=names, held_out=["owner/one:test"]))
    assert Counter(pair.source for pair in train) == {"one-first": 20, "one-second": 10}
    assert {pair.source for pair in held_out} == {"one"}
    alone = preferences.load(config.Data(name="hub", train=names[:1], held_out=["owner/one:test"])).train
    assert {pair.source for pair in alone} == {"one"}


@pytest.mark.parametrize("saved", [False, True])
def test_folders_of_data_sets(tmp_path, monkeypatch, saved):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "some.where" / "easy"
    rows = datasets.Dataset.from_list(ROWS[:20])
    if saved:
        datasets.DatasetDict({"train": rows, "test": rows.select(range(2))}).save_to_disk(folder)
        rows.select(range(5, 9)).save_to_disk(folder.parent / "one")
        one = preferences.load(config.Data(name="hub", train=[str(folder.parent / "one")], held_out_share=0))
        assert [pair.chosen for pair in one.train] == [row["chosen"] for row in ROWS[5:9]]
        with pytest.raises(UserError, match="easy:dev: has no split dev; it has train, test"):
            preferences.load(config.Data(name="hub", train=[f"{folder}:dev"]))
    else:
        folder.mkdir(parents=True)
        write(folder / "train.jsonl", ROWS[:20])
    train, _, report, _ = preferences.load(config.Data(name="hub", train=[str(folder)], held_out_share=0))
    assert {pair.source for pair in train} == {"easy"} and len(train) == 20
    with pytest.raises(UserError, match="easy: is a folder; read a data set's folder with data=hub"):
        load(str(folder))
    with pytest.raises(UserError, match="nowhere: there is no folder /nowhere"):
        preferences.load(config.Data(name="hub", train=["/nowhere"]))


def test_long_cells(tmp_path):
    rows = [ROWS[0], ROWS[1] | {"chosen": "y" * 200_000}]
    train = load(write(tmp_path / "a.csv", rows), held_out_share=0).train
    assert [len(pair.chosen) for pair in train] == [7, 200_000]


def test_conversations_and_tools_in_every_format(tmp_path):
    turns = [{"role": "user", "content": "Why?"}]
    row = {"messages": turns, "chosen": "a", "rejected": "b", "tools": [{"name": "find"}]}
    text = {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
    expected = preferences.Pair("", "", tuple(turns), "a", "b", inputs={"tools": [{"name": "find"}]})
    for name, given in {"a.jsonl": row, "b.csv": text, "c.parquet": text, "d.parquet": row}.items():
        (pair,) = load(write(tmp_path / name, [given]), held_out_share=0).train
        assert replace(pair, id="", source="") == expected
        preferences.write_jsonl(tmp_path / "pairs", [pair])
        assert preferences.read_jsonl(tmp_path / "pairs") == [pair]


def test_hub_errors_take_one_line(monkeypatch):
    import datasets

    def load_dataset(*names, **settings):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"owner/one: cannot be loaded from the Hub \(no network\)"):
        preferences.load(config.Data(name="hub", train=["owner/one"]))


def test_jsonl_round_trip(tmp_path):
    turns = ({"role": "user", "content": "Größe?\u2028"},)
    pairs = [preferences.Pair("1", "a", turns, "x", "y", 1.0, 0.5), preferences.Pair("2", "a", turns, "x", "")]
    pairs.append(replace(pairs[0], pair_score=0.0))
    preferences.write_jsonl(tmp_path / "pairs.jsonl", pairs)
    assert preferences.read_jsonl(tmp_path / "pairs.jsonl") == pairs


def test_real_files(real_data):
    train, held_out, report, _ = load(
        *sorted(map(str, real_data.glob("pairs/*.train.jsonl"))),
        held_out=sorted(map(str, real_data.glob("pairs/*.eval.jsonl"))),
    )
    assert (len(train), len(held_out), report["dropped"]) == (2282, 251, {})
    assert report["sources"]["train"]["step2_ultrafeedback"]["rated"] == 299
    raw = {path.stem: load(str(path), held_out_share=0) for path in real_data.glob("raw/*.jsonl")}
    layouts = {name: loaded.report["files"][0]["layouts"] for name, loaded in raw.items()}
    assert layouts == {
        "hh_rlhf": {"transcript": 40},
        "openai_preference": {"openai": 40},
        "orca_dpo_pairs": {"orca": 39},
        "ultrafeedback_binarized": {"conversation": 39},
        "ultrafeedback_cleaned_argilla": {"conversation": 40},
    }
    assert all(pair.chosen_rating is not None for pair in raw["ultrafeedback_binarized"].train)
    same = {pair.chosen: pair for pair in train + held_out}  # the raw rows stand among the normalised ones
    for pair in raw["hh_rlhf"].train:
        assert (pair.prompt, pair.rejected) == (same[pair.chosen].prompt, same[pair.chosen].rejected)
