"""What a file has and a run does not use is told, file by file: rows with their reasons, and columns."""

import json

import pytest
from toys import prepare

from sdpo.data import schemas
from sdpo.data.readers import read_file
from sdpo.errors import UserError


def test_rows_that_are_left_out_are_told(toy, tmp_path, capsys):
    given = (toy / "a.jsonl").read_text().splitlines()[:12]
    bad = tmp_path / "odd.jsonl"
    bad.write_text("\n".join([*given, '{"prompt": "x", "chosen": "y"}', "not JSON"]))
    prepare(toy, tmp_path / "store", f"data.train=[{bad}]", "data.on_bad_row=skip")
    said = capsys.readouterr().err
    assert (
        f"{bad}: not all 14 rows are used (1 missing_column, 1 invalid_json); data_report.json names the rest" in said
    )
    assert "columns" not in said


def test_columns_that_nothing_reads_are_named(toy, tmp_path, capsys):
    rows = [json.loads(line) for line in (toy / "a.jsonl").read_text().splitlines()[:12]]
    rows[3] |= {"system_prompt": "Be brief.", "model": "", "notes": None, "source": "us", "score_chosen": 1}
    file = tmp_path / "more.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    _, inputs = prepare(toy, tmp_path / "store", f"data.train=[{file}]")
    assert inputs.report["files"][0]["unread_columns"] == ["system_prompt"]
    said = capsys.readouterr().err
    assert f"{file}: columns that are not read: system_prompt (data.columns names those that are)\n" in said


def test_columns_that_are_not_mapped_are_named(toy, tmp_path):
    rows = [json.loads(line) for line in (toy / "a.jsonl").read_text().splitlines()[:12]]
    rows = [
        {"ask": row["prompt"], "good": row["chosen"], "bad": row["rejected"], "images": [], "lead": 0} for row in rows
    ]
    rows[3] |= {"images": ["cat.png"], "lead": -2}
    file = tmp_path / "more.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    columns = "data.columns={prompt:ask,chosen:good,rejected:bad}"
    _, inputs = prepare(toy, tmp_path / "store", f"data.train=[{file}]", columns)
    assert inputs.report["files"][0]["unread_columns"] == ["images", "lead"]


@pytest.mark.parametrize("cell", ['"Yes, it is', '"Yes" is right'])
def test_a_stray_quote_swallows_no_rows(tmp_path, cell):
    file = tmp_path / "a.csv"
    file.write_text(f"prompt,chosen,rejected\nWhy?,No,{cell}\nHow?,So,Not so\n")
    with pytest.raises(UserError, match="is not a valid .csv file"):
        read_file(str(file))


ASK, SO, NO = (
    {"role": role, "content": text} for role, text in (("user", "Why?"), ("assistant", "So."), ("assistant", "No."))
)
AS_TEXT = {"prompt": json.dumps([ASK]), "chosen": json.dumps([ASK, SO]), "rejected": json.dumps([ASK, NO])}


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"prompt": "Summarise:", "input": "A text.", "chosen": "Yes.", "rejected": "No."}, {"input"}),
        ({"question": "Why?", "prompt": "How?", "chosen": "Yes.", "rejected": "No."}, {"prompt"}),
        ({"prompt": "How?", "messages": [ASK, SO], "chosen": [ASK, SO], "rejected": [ASK, NO]}, {"prompt"}),
        (AS_TEXT | {"label": 1, "empty": ""}, {"label"}),
    ],
)
def test_a_column_of_another_layout_is_named_if_it_says_more_than_what_was_read(row, unread):
    assert schemas.normalise(row).unread == unread
