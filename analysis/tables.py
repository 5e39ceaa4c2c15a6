"""Tables of a run or a sweep, and the paper's beside ours.

    python -m analysis.tables RUN_OR_SWEEP... [--format text|markdown|latex]
    python -m analysis.tables paper [--out FOLDER]

The functions return numbers, an `Interval` to a cell where there is one; `show` makes strings of them.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from analysis import collect, equal_kl, published, table_format
from analysis.statistics import INERT, holm, paired, sign_flip, verdict
from sdpo.errors import UserError
from sdpo.stats import Interval, student

COMPANIONS = {
    "lab/gold": "gold reward",
    "lab/kl": "KL to S (nats)",
    "preference/reward_accuracy_initial": "reward accuracy",
    "preference/ranking_accuracy": "ranking accuracy",
    "win_rate/length_controlled": "win rate, equal length",
    "generate/kl": "KL of answers (nats)",
}
STEP_COLUMNS = {
    "first_loss": "first loss",
    "last_loss": "last loss",
    "gamma_ref_mean": "gamma_ref (nats)",
    "gamma_ref_negative_share": "gamma_ref < 0",
    "reference_leverage": "leverage",
}
DIGITS = {
    "seconds": 1,
    "seeds there": 0,
    "KL to S (nats)": 2,
    "KL of answers (nats)": 2,
    "gamma_ref (nats)": 2,
    "first loss": 4,
}


def arms(*paths: Path | str) -> pd.DataFrame:
    """One row per arm, with S first: seeds, headline, companions, gain over S, time, reused steps."""
    runs, measures = collect.runs(*paths), collect.measures(*paths)
    headline = headline_name(runs)
    names = {name: COMPANIONS.get(name, name) for name in (headline, *COMPANIONS) if name}
    final = measures[measures["t"] == measures.groupby("run")["t"].transform("max")]
    gains = collect.by_arm(_gains(measures[measures["measure"] == headline]), []).set_index("arm")
    values = collect.by_arm(final, ["measure"]).set_index(["arm", "measure"])
    rows = [_start(measures, names)]
    for arm, group in runs.groupby("arm", sort=False):
        cells = {title: _cell(values, (arm, name)) for name, title in names.items()}
        steps = group["trained_steps"].sum() + group["reused_steps"].sum()
        rows.append(
            {"arm": arm, "seeds": f"{group['done'].sum()} of {len(group)}"}
            | cells
            | {"gain over S": _cell(gains, arm), "seconds": group["seconds"].mean()}
            | {"steps reused": f"{group['reused_steps'].sum():.0f} of {steps:.0f}"}
        )
    return pd.DataFrame(rows).dropna(axis=1, how="all")


def contrasts(*paths: Path | str) -> pd.DataFrame:
    """The verdicts: one row per declared contrast whose arms exist, with the paired difference of headlines, the tests,
    and the same difference at equal KL to S, where plain DPO's line says what that KL alone would give.
    """
    runs, steps, gains = collect.runs(*paths), collect.steps(*paths), equal_kl.gains(*paths)
    declared = {
        name: pair for name, pair in collect.declared(*paths)["contrasts"].items() if set(pair) <= set(runs["arm"])
    }
    table = pd.DataFrame(
        {"of": name} | _contrast(*pair, runs, steps) | _at_equal_kl(*pair, gains) for name, pair in declared.items()
    )
    if table.empty:
        return table
    table["p, Holm"] = holm(table["p"])
    table["verdict"] = [
        verdict(difference, p, num_contrasts=len(table), inert=inert, at_equal_kl=at_equal_kl)
        for difference, p, inert, at_equal_kl in zip(
            *(table[name] for name in ("difference", "p, Holm", "inert", "at equal KL")), strict=True
        )
    ]
    tested, by_kl = ["contrast", "difference", "seeds", "p", "p, Holm"], ["at equal KL", "seeds there"]
    return table[["of", "verdict", *tested, *by_kl, "leverage"]].dropna(axis=1, how="all")


def steps(*paths: Path | str) -> pd.DataFrame:
    """One row per arm and step: its reference, how it began and ended, and the headline after it."""
    table, measures = collect.steps(*paths), collect.measures(*paths)
    headline = headline_name(collect.runs(*paths))
    columns = {title: collect.by_arm(table, ["t"], name) for name, title in STEP_COLUMNS.items()}
    if headline:
        columns[COMPANIONS.get(headline, headline)] = collect.by_arm(measures[measures["measure"] == headline], ["t"])
    columns = {title: column.set_index(["arm", "t"]) for title, column in columns.items()}
    return pd.DataFrame(
        {
            "arm": arm,
            "t": t,
            "reference": "; ".join(group["reference"].unique()),
            "pairs": round(group["num_pairs"].mean()),
        }
        | {title: _cell(column, (arm, t)) for title, column in columns.items()}
        for (arm, t), group in table.groupby(["arm", "t"], sort=False)
    )


def headline_name(runs: pd.DataFrame) -> str | None:
    """The measure that heads these runs, None where none was measured; `UserError` where they differ."""
    names = runs["headline_name"].dropna().unique()
    if len(names) > 1:
        raise UserError(f"these runs have the headlines {', '.join(names)}; give runs that share one")
    return names[0] if len(names) else None


def show(table: pd.DataFrame) -> pd.DataFrame:
    """The same table in strings, rounded for readers."""
    return pd.DataFrame({name: [_string(value, DIGITS.get(name, 3)) for value in table[name]] for name in table})


def _string(value: object, digits: int) -> str:
    if isinstance(value, Interval):
        return table_format.number(value.value, value.low, value.high, digits)
    if isinstance(value, float):
        return table_format.number(value, digits=digits)
    return "" if value is None else str(value)


def _cell(table: pd.DataFrame, key: object) -> Interval | None:
    """The interval that stands at `key` of a table made by `collect.by_arm`."""
    if key not in table.index:
        return None
    found = Interval(*table.loc[key, ["value", "low", "high", "seeds"]])
    return None if pd.isna(found.value) else found


def _start(measures: pd.DataFrame, names: dict[str, str]) -> dict:
    """S as a row; arms of one seed share S, and where they do not, S is left to the arms' gains."""
    initial = measures[measures["t"] == 0].drop_duplicates(["seed", "measure", "value"]).assign(arm="S")
    shared = initial[~initial.duplicated(["seed", "measure"], keep=False)]
    values = collect.by_arm(shared, ["measure"]).set_index(["arm", "measure"])
    return {"arm": "S", "seeds": ""} | {title: _cell(values, ("S", name)) for name, title in names.items()}


def _gains(headline: pd.DataFrame) -> pd.DataFrame:
    """Each run's headline after its last step minus that of its own S."""
    by_step = headline.sort_values("t").groupby(["arm", "seed"], sort=False)["value"]
    return (by_step.last(skipna=False) - by_step.first(skipna=False)).reset_index()


def _contrast(first: str, second: str, runs: pd.DataFrame, steps: pd.DataFrame) -> dict:
    headline = runs.set_index("seed").groupby("arm")["headline"]
    differences = paired(headline.get_group(first), headline.get_group(second))
    leverage = max(_leverage(steps[steps["arm"] == arm]) for arm in (first, second))
    rules = [set(runs.loc[runs["arm"] == arm, "choices.reference"]) for arm in (first, second)]
    return {
        "contrast": f"{first} - {second}",
        "difference": student(differences),
        "seeds": len(differences),
        "p": sign_flip(differences),
        "leverage": leverage,
        "inert": rules[0] != rules[1] and leverage < INERT,
    }


def _at_equal_kl(first: str, second: str, gains: pd.DataFrame) -> dict:
    """The difference of two arms' gains over plain DPO's line, on the seeds of which that line says something."""
    by_arm = {arm: group.set_index("seed")["gain"] for arm, group in gains.groupby("arm")}
    known = {first, second} <= by_arm.keys()
    found = student(paired(by_arm[first], by_arm[second]) if known else [])
    return {"at equal KL": found if found.n else None, "seeds there": found.n or None}


def _leverage(steps: pd.DataFrame) -> float:
    """How much the reference changed a pair's weight, over seeds, in the step where it changed it most."""
    return steps.groupby("t")["reference_leverage"].mean().max()


def _of_runs(paths: list[Path], form: str) -> list[str]:
    """The tables of runs and sweeps, those with rows, set in one of the forms of layout.FORMATS."""
    of_seeds = "mean and 95 % Student t interval over seeds (with one seed: its own, over prompts or pairs)"
    tables = {
        f"Arms: {of_seeds}": arms(*paths),
        "Declared contrasts: paired over seeds, exact sign-flip test, Holm's correction": contrasts(*paths),
        "Exploratory: gold reward above plain DPO's line at equal KL to S": equal_kl.above_plain(*paths),
        f"Steps: {of_seeds}": steps(*paths),
    }
    return [table_format.setting(show(table), title, [], form) for title, table in tables.items() if len(table)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis.tables", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", help="`paper`, or run and sweep folders")
    parser.add_argument("--format", choices=table_format.FORMATS, default="text")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the paper's experiments ran (out)")
    chosen = parser.parse_args()
    try:
        if chosen.what == ["paper"]:
            made = published.set_tables(chosen.out, chosen.format)
        else:
            made = _of_runs(list(map(Path, chosen.what)), chosen.format)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(table_format.document(made, chosen.format))


if __name__ == "__main__":
    main()
