"""Rows that are left out are told, file by file, with their reasons."""

from toys import prepare


def test_rows_that_are_left_out_are_told(toy, tmp_path, capsys):
    given = (toy / "a.jsonl").read_text().splitlines()[:12]
    bad = tmp_path / "odd.jsonl"
    bad.write_text("\n".join([*given, '{"prompt": "x", "chosen": "y"}', "not JSON"]))
    prepare(toy, tmp_path / "store", f"data.train=[{bad}]", "data.on_bad_row=skip")
    said = capsys.readouterr().err
    assert f"{bad}: not all 14 rows are used (1 missing_column, 1 invalid_json); data_report.json names the oth" in said
