"""The paper's printed numbers beside ours, where runs of the same experiment exist; never a number invented.

The facts, their sources and their oddities stand in data/paper.yaml.
"""

from pathlib import Path

import pandas as pd
import yaml

from analysis import collect, table_format
from sdpo.stats import Interval

FACTS = Path(__file__).parent / "data" / "paper.yaml"
NOTHING = Interval(float("nan"), float("nan"), float("nan"), 0)


def facts() -> list[dict]:
    """The printed tables: title, source, experiment, columns, rows and notes."""
    return yaml.safe_load(FACTS.read_text(encoding="utf-8"))["tables"]


def side_by_side(table: dict, out: Path) -> pd.DataFrame:
    """One row per printed value: model, column, paper, ours (an `Interval` over seeds), difference."""
    sweep = out / table["experiment"].replace("/", "_")
    ours = _ours(sweep)
    rows = []
    for row in table["rows"]:
        for (column, source), printed in zip(table["columns"].items(), row["paper"], strict=True):
            mean = _scaled(ours.get((row.get("arm"), row.get("t", "last"), source["measure"])), source["scale"])
            rows.append((row["model"], column, printed, mean, mean.value - printed))
    return pd.DataFrame(rows, columns=["model", "column", "paper", "ours", "difference"])


def set_tables(out: Path, form: str) -> list[str]:
    """Every table of the paper, set in one of the forms of layout.FORMATS."""
    made = []
    for table in facts():
        numbers = side_by_side(table, out)
        notes = [f"Paper: {table['source']}; single runs.", *table["notes"]]
        if any(mean.n for mean in numbers["ours"]):
            notes.append(f"Ours: {out / table['experiment']}, mean and 95 % Student t interval over seeds.")
        made.append(table_format.setting(_wide(numbers), table["title"], notes, form))
    return made


def _ours(sweep: Path) -> dict[tuple, Interval]:
    """(arm, t or "last", measure) -> our mean over seeds; nothing where the sweep was not run."""
    if not sweep.is_dir():
        return {}
    measures = collect.measures(sweep)[["run", "arm", "seed", "t", "measure", "value"]]
    measures = pd.concat([measures, _gammas(sweep)], ignore_index=True)
    is_last = measures["t"] == measures.groupby("run")["t"].transform("max")
    named = pd.concat([measures, measures[is_last].assign(t="last")])
    means = collect.by_arm(named, ["t", "measure"])
    return {(row.arm, row.t, row.measure): Interval(*row[4:]) for row in means.itertuples()}


def _gammas(sweep: Path) -> pd.DataFrame:
    """Mean gamma of each M_t on each chunk's training pairs, as measures `trajectory/gamma/chunk_<t>`."""
    ended = collect.trajectory(sweep).query("role == 'policy' and update == -1 and not held_out")
    means = ended.groupby(["run", "arm", "seed", "t", "chunk"], as_index=False)["gamma"].mean()
    names = "trajectory/gamma/chunk_" + means["chunk"].astype(str)
    return means.assign(measure=names, value=means["gamma"])[["run", "arm", "seed", "t", "measure", "value"]]


def _scaled(mean: Interval | None, scale: float) -> Interval:
    return Interval(*(scale * part for part in mean[:3]), mean.n) if mean else NOTHING


def _wide(numbers: pd.DataFrame) -> pd.DataFrame:
    """One line per model: for each column the paper's number, ours with its interval, and the difference."""
    lines, heads = [], ["model"]
    for model, group in numbers.groupby("model", sort=False):
        lines.append([model])
        for row in group.itertuples():
            lines[-1] += [table_format.number(row.paper, digits=2), table_format.number(*row.ours[:3], digits=2)]
            lines[-1] += [table_format.number(row.difference, digits=2)]
        lines[-1].append(str(group["ours"].map(lambda mean: mean.n).max() or ""))
    for column in numbers["column"].unique():
        heads += [column, "ours", "diff"]
    return pd.DataFrame(lines, columns=[*heads, "seeds"])
