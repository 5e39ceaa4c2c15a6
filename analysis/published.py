"""Printed tables of the paper and of others, with our numbers beside them for the experiments that were run here.

The printed numbers, their sources and notes on them are in data/paper.yaml and data/published.yaml.
"""

from math import nan
from pathlib import Path

import pandas as pd
import yaml

from analysis import collect, table_format
from sdpo.errors import UserError
from sdpo.stats import Interval

DATA = Path(__file__).parent / "data"
UNKNOWN = Interval(nan, nan, nan, 0)


def facts(of: str = "paper") -> list[dict]:
    """The printed tables of the `paper`, or all others (`published`).

    Each has title, source, experiment, columns, rows and notes.
    """
    return yaml.safe_load((DATA / f"{of}.yaml").read_text(encoding="utf-8"))["tables"]


def side_by_side(table: dict, out: Path) -> pd.DataFrame:
    """One row per printed value: model, column, paper, ours (an `Interval` over seeds, nan if unknown), difference."""
    sweep = find_sweep(table, out)
    ours, rows = _ours(sweep) if sweep else {}, []
    for row in table["rows"]:
        for (column, source), printed in zip(table["columns"].items(), row["paper"], strict=True):
            mean = ours.get((row.get("arm"), row.get("t", "last"), source["measure"]), UNKNOWN)
            value, low, high = (source["scale"] * number for number in mean[:3])
            mean = Interval(value, low, high, mean.n)
            rows.append((row["model"], column, printed, mean, mean.value - printed))
    return pd.DataFrame(rows, columns=["model", "column", "paper", "ours", "difference"])


def find_sweep(table: dict, out: Path) -> Path | None:
    """The folder of the sweep of a table's experiment, None if there is none. Raises UserError if there are several."""
    name = table["experiment"].replace("/", "_")  # as sdpo.run.folder.sweep_name; overrides add a hyphen and a hash
    found = sorted(folder for pattern in (name, f"{name}-*") for folder in out.glob(pattern) if folder.is_dir())
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise UserError(f"{out} holds several sweeps of {table['experiment']}: {names}; move all but one elsewhere")
    return found[0] if found else None


def render_tables(of: str, out: Path, form: str) -> list[str]:
    """Every table of the `paper`, or all others (`published`), in one of table_format.FORMATS."""
    rendered = []
    for table in facts(of):
        numbers = side_by_side(table, out)
        runs = "; each number is from a single run" if of == "paper" else ""
        notes = [f"Printed in {table['source']}{runs}.", *table["notes"]]
        if any(mean.n for mean in numbers["ours"]):
            notes.append(f"Ours: {find_sweep(table, out)}, mean and 95 % Student t interval over seeds.")
        rendered.append(table_format.render(_wide(numbers, table["columns"]), table["title"], notes, form))
    return rendered


def _ours(sweep: Path) -> dict[tuple, Interval]:
    """(arm, t or "last", measure) -> our mean over seeds.

    A benchmark has one name here, whether evaluate=judge measured it or evaluate=results read it from a file.
    """
    measures = collect.measures(sweep)[["run", "arm", "seed", "t", "measure", "value"]]
    measures = measures.assign(measure=measures["measure"].str.removeprefix("judge/"))
    measures = measures.drop_duplicates(["run", "t", "measure"])
    measures = pd.concat([measures, _gammas(sweep)], ignore_index=True)
    named = pd.concat([measures, collect.last(measures).assign(t="last")])
    means = collect.by_arm(named, ["t", "measure"])
    return {(m.arm, m.t, m.measure): Interval(m.value, m.low, m.high, m.seeds) for m in means.itertuples()}


def _gammas(sweep: Path) -> pd.DataFrame:
    """Mean gamma of each M_t on the probe pairs of each chunk, as measures `trajectory/gamma/chunk_<t>`."""
    ended = collect.trajectory(sweep).query("role == 'policy' and update == -1 and not held_out")
    means = ended.groupby(["run", "arm", "seed", "t", "chunk"], as_index=False)["gamma"].mean()
    names = "trajectory/gamma/chunk_" + means["chunk"].astype(str)
    return means.assign(measure=names, value=means["gamma"])[["run", "arm", "seed", "t", "measure", "value"]]


def _wide(numbers: pd.DataFrame, columns: dict[str, dict]) -> pd.DataFrame:
    """One row per model: each column's printed number, ours with its interval, and the difference, if they exist."""
    shown = []  # head, column, what of it
    for column, source in columns.items():
        printed = numbers.loc[numbers["column"] == column, "paper"].notna().any()
        if printed:
            shown.append((column, column, "paper"))
        if source["measure"]:
            shown.append(("ours" if printed else f"{column}, ours", column, "ours"))
        if printed and source["measure"]:
            shown.append(("diff", column, "difference"))
    cells, lines = numbers.set_index(["model", "column"]), []
    for model, group in numbers.groupby("model", sort=False):
        values = [
            table_format.number(cells.at[(model, column), kind], columns[column].get("digits", 2))
            for _, column, kind in shown
        ]
        lines.append([model, *values, str(max(mean.n for mean in group["ours"]) or "")])
    return pd.DataFrame(lines, columns=["model", *(head for head, _, _ in shown), "seeds"])
