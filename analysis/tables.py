"""Tables of runs and sweeps, and the paper's tables with our numbers beside them.

    python -m analysis.tables RUN_OR_SWEEP... [--format text|markdown|latex]
    python -m analysis.tables paper|published [--out FOLDER]

The functions return tables whose cells hold numbers or `Interval`s; `show` makes strings of them.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import collect, equal_kl, published, table_format
from analysis.significance import INERT, LEFT_S, holm, paired, sign_flip, verdict
from sdpo.errors import UserError
from sdpo.stats import Interval, student

OWN = ("preference/", "lab/")  # suites whose measures the table of arms and the figures show
COMPANIONS = {
    "lab/gold": "gold reward",
    "lab/kl": "KL to S (nats)",
    "preference/reward_accuracy_initial": "reward accuracy",
    "preference/ranking_accuracy": "ranking accuracy",
    "win_rate/length_controlled": "win rate, equal length",
    "judge/length_controlled": "judged win rate, equal length",
    "alpaca_eval/length_controlled": "AlpacaEval, equal length",
    "arena_hard/win_rate": "Arena-Hard",
    "mt_bench/score": "MT-Bench",
    "reward_bench/accuracy": "implicit reward accuracy",
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
    "training (s)": 1,
    "seeds there": 0,
    "KL to S (nats)": 2,
    "median (nats)": 2,
    "largest (nats)": 2,
    "KL of answers (nats)": 2,
    "gamma_ref (nats)": 2,
    "gamma_ref, unseen (nats)": 2,
    "first loss": 4,
}


def arms(*paths: Path | str) -> pd.DataFrame:
    """One row for S, then one per arm: seeds, headline and other measures, gain over S, seconds of training, reused
    steps. The seconds are those of all updates that made a run's models, whichever run made them.
    """
    runs, measures = collect.runs(*paths), collect.measures(*paths)
    updates = collect.train(*paths).reindex(columns=["run", "seconds"])  # old runs lack seconds
    training = updates.groupby("run")["seconds"].sum(min_count=1)
    headline = headline_name(runs)
    names = {name: COMPANIONS.get(name, name) for name in (headline, *COMPANIONS) if name}
    gains = collect.by_arm(_gains(measures[measures["measure"] == headline]), []).set_index("arm")
    values = collect.by_arm(collect.last(measures), ["measure"]).set_index(["arm", "measure"])
    rows = [_start(measures, runs, names)]
    for arm, group in runs.groupby("arm", sort=False):
        cells = {title: _cell(values, (arm, name)) for name, title in names.items()}
        steps = group["trained_steps"].sum() + group["reused_steps"].sum()
        rows.append(
            {"arm": arm, "seeds": f"{group['done'].sum()} of {len(group)}"}
            | cells
            | {"gain over S": _cell(gains, arm), "training (s)": group["run"].map(training).mean()}
            | {"steps reused": f"{group['reused_steps'].sum():.0f} of {steps:.0f}"}
        )
    return pd.DataFrame(rows).dropna(axis=1, how="all")


def medians(*paths: Path | str) -> pd.DataFrame:
    """One row per arm: mean and median of gold reward and of KL to S over seeds, the largest KL, and the number of
    seeds that left S, all after the last step. Empty if they were not measured, and if no arm has two seeds.
    """
    last = collect.last(collect.measures(*paths))
    by_seed = last.pivot(index=["arm", "seed"], columns="measure", values="value").reindex(columns=equal_kl.AXES)
    rows = []
    for arm in last["arm"].unique():
        kl, gold = by_seed.loc[arm].dropna().T.to_numpy()
        if len(kl):
            far = f"{np.sum(kl > LEFT_S)} of {len(kl)}"
            middle = {"gold reward": gold.mean(), "its median": np.median(gold), "KL to S (nats)": kl.mean()}
            middle |= {"median (nats)": np.median(kl), "largest (nats)": kl.max()}
            rows.append({"arm": arm} | middle | {"left S": far})
    has_seeds = by_seed.groupby("arm").size().max() > 1
    return pd.DataFrame(rows if has_seeds else [])


def others(*paths: Path | str) -> pd.DataFrame:
    """One row per measure of the suites that were asked for beside the pairs' and the laboratory's (h4, lm_eval, ...),
    one column for S and one per arm, after the last step. Empty if there are none.
    """
    measures = collect.measures(*paths)
    asked = measures[~measures["measure"].str.startswith(OWN) & ~measures["measure"].isin(COMPANIONS)]
    if asked.empty:
        return asked
    names = {name: name for name in asked["measure"].unique()}
    values = collect.by_arm(collect.last(asked), ["measure"]).set_index(["arm", "measure"])
    start = _start(asked, collect.runs(*paths), names)
    columns = {
        "S": start,
        **{arm: {name: _cell(values, (arm, name)) for name in names} for arm in asked["arm"].unique()},
    }
    return pd.DataFrame(
        {"measure": list(names)} | {arm: [cells[name] for name in names] for arm, cells in columns.items()}
    )


def contrasts(*paths: Path | str) -> pd.DataFrame:
    """One row per declared contrast whose arms exist: its verdict, the paired difference of headlines with its test,
    and the difference at equal KL to S, in gold reward above plain DPO (see equal_kl).
    """
    runs, steps, gains = collect.runs(*paths), collect.steps(*paths), equal_kl.gains(*paths)
    declared = collect.declared(*paths)["contrasts"]
    rows = [
        {"of": name} | _contrast(first, second, runs, steps) | _at_equal_kl(first, second, gains)
        for name, (first, second) in declared.items()
        if {first, second} <= set(runs["arm"])
    ]
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p, Holm"] = p
        row["verdict"] = verdict(
            row["difference"], p, num_contrasts=len(rows), inert=row["inert"], at_equal_kl=row["at equal KL"]
        )
    tested = ["difference", "verdict", "contrast", "seeds", "p", "p, Holm"]
    by_kl = ["at equal KL", "seeds there"]
    return pd.DataFrame(rows, columns=["of", *tested, *by_kl, "leverage"]).dropna(axis=1, how="all")


def steps(*paths: Path | str) -> pd.DataFrame:
    """One row per arm and step: its reference, pairs, first and last loss, and the headline after the step."""
    table, measures = collect.steps(*paths), collect.measures(*paths)
    headline = headline_name(collect.runs(*paths))
    columns = {title: collect.by_arm(table, ["t"], name) for name, title in STEP_COLUMNS.items()}
    columns["gamma_ref, unseen (nats)"] = collect.by_arm(measures[measures["measure"] == "preference/gamma_ref"], ["t"])
    if headline:
        columns[COMPANIONS.get(headline, headline)] = collect.by_arm(measures[measures["measure"] == headline], ["t"])
    columns = {title: column.set_index(["arm", "t"]) for title, column in columns.items()}
    return pd.DataFrame(
        {"arm": arm, "t": t, "reference": "; ".join(group["reference"].unique())}
        | {"pairs": round(group["num_pairs"].mean())}
        | {title: _cell(column, (arm, t)) for title, column in columns.items()}
        for (arm, t), group in table.groupby(["arm", "t"], sort=False)
    )


def headline_name(runs: pd.DataFrame) -> str | None:
    """The headline measure of these runs, None if they have none. Raises UserError if their headlines differ."""
    names = runs["headline_name"].dropna().unique()
    if len(names) > 1:
        raise UserError(f"these runs have the headlines {', '.join(names)}; give runs that share one")
    return names[0] if len(names) else None


def size(runs: pd.DataFrame) -> str:
    """How many arms and seeds there are, and whether seeds share S: intervals over seeds cover only what differs."""
    starts, seeds = runs["model_key"].nunique(), runs["seed"].nunique()
    counted = [count(runs["arm"].nunique(), "arm"), count(seeds, "seed")]
    if starts and seeds > 1:
        counted.append("all from one S" if starts == 1 else f"from {starts} different S")
    return ", ".join(counted)


def count(number: int, what: str) -> str:
    """`1 arm`, `2 arms`."""
    return f"{number} {what}{'s' * (number != 1)}"


def show(table: pd.DataFrame) -> pd.DataFrame:
    """The table with rounded strings as cells."""
    return pd.DataFrame({name: [_string(value, DIGITS.get(name, 3)) for value in table[name]] for name in table})


def _string(value: object, digits: int) -> str:
    if isinstance(value, Interval | float):
        return table_format.number(value, digits)
    return "" if value is None else str(value)


def _cell(table: pd.DataFrame, key: object) -> Interval | None:
    """The interval at `key` in a table of `collect.by_arm`; None if there is none."""
    if key not in table.index:
        return None
    found = Interval(*table.loc[key, ["value", "low", "high", "seeds"]])
    return None if pd.isna(found.value) else found


def _start(measures: pd.DataFrame, runs: pd.DataFrame, names: dict[str, str]) -> dict:
    """The row of S. Arms with the same seed share S; for a seed with several S the row leaves that seed out.

    If seeds share S, too, its values are one observation, with the interval of its own evaluation.
    """
    keys = measures["run"].map(runs.set_index("run")["model_key"])
    initial = measures.assign(arm="S", model_key=keys)[measures["t"] == 0].drop_duplicates(["seed", "measure", "value"])
    by_seed = initial[~initial.duplicated(["seed", "measure"], keep=False)]
    observed = by_seed.drop_duplicates(["model_key", "measure", "value"])
    values = collect.by_arm(observed, ["measure"]).set_index(["arm", "measure"])
    return {"arm": "S", "seeds": ""} | {title: _cell(values, ("S", name)) for name, title in names.items()}


def _gains(headline: pd.DataFrame) -> pd.DataFrame:
    """The headline of each run after its last step, minus the headline of its own S."""
    by_step = headline.sort_values("t").groupby(["arm", "seed"], sort=False)["value"]
    return (by_step.last(skipna=False) - by_step.first(skipna=False)).reset_index()


def _contrast(first: str, second: str, runs: pd.DataFrame, steps: pd.DataFrame) -> dict:
    """The paired difference first - second with its test, and whether a reference that differs was inert."""
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
    """The paired difference of two arms' gains over plain DPO, on the seeds for which both are known.

    Two arms of plain DPO have none: each lies on its own line.
    """
    by_arm = {arm: group.set_index("seed")["gain"] for arm, group in gains.groupby("arm")}
    known = {first, second} <= by_arm.keys() and not {first, second} <= set(gains.loc[gains["plain"], "arm"])
    found = student(paired(by_arm[first], by_arm[second]) if known else [])
    return {"at equal KL": found if found.n else None, "seeds there": found.n or None}


def _leverage(steps: pd.DataFrame) -> float:
    """The mean leverage over seeds, in the step in which it is largest."""
    return steps.groupby("t")["reference_leverage"].mean().max()


def _render_tables(paths: list[Path], form: str) -> list[str]:
    """The tables of runs and sweeps that have rows, in one of table_format.FORMATS."""
    of_seeds = "mean and 95 % Student t interval over seeds (one seed: its own interval, over prompts or pairs)"
    of_seeds += f"; {size(collect.runs(*paths))}"
    tables = {
        f"Arms: {of_seeds}": arms(*paths),
        f"Medians, and seeds that left S (KL above {LEFT_S:g} nats)": medians(*paths),
        f"Other measures after the last step: {of_seeds}": others(*paths),
        "Declared contrasts: paired over seeds, exact sign-flip test, Holm's correction": contrasts(*paths),
        "Exploratory: gold reward above plain DPO at equal KL to S": equal_kl.above_plain(*paths),
        f"Steps: {of_seeds}": steps(*paths),
    }
    return [table_format.render(show(table), title, [], form) for title, table in tables.items() if len(table)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis.tables", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", help="`paper`, `published`, or any run and sweep folders")
    parser.add_argument("--format", choices=table_format.FORMATS, default="text")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of their sweeps; default: out")
    chosen = parser.parse_args()
    try:
        if chosen.what in (["paper"], ["published"]):
            rendered = published.render_tables(chosen.what[0], chosen.out, chosen.format)
        else:
            rendered = _render_tables(list(map(Path, chosen.what)), chosen.format)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(table_format.document(rendered, chosen.format))


if __name__ == "__main__":
    main()
