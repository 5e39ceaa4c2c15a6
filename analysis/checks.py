"""What a careful reader would object to in a run or a sweep, each with the cases where it holds."""

from textwrap import shorten
from typing import NamedTuple

import pandas as pd

from analysis import collect
from analysis.statistics import INERT, LEVEL, smallest_p

NEAR = 0.03  # of an accuracy: closer than this to a baseline is no evidence against it


class Warning(NamedTuple):
    title: str
    sentence: str
    cases: list[str]


def warnings(
    runs: pd.DataFrame, measures: pd.DataFrame, steps: pd.DataFrame, references: pd.DataFrame
) -> list[Warning]:
    """All that apply, the gravest first; the tables are those of `collect`, of runs that ended except for `runs`."""
    found = [
        unfinished(runs),
        inert_reference(steps),
        seen_by_reference(references),
        length_bias(measures),
        displacement(measures),
        too_few_seeds(runs),
    ]
    return [warning for warning in found if warning.cases]


def unfinished(runs: pd.DataFrame) -> Warning:
    left = runs[~runs["done"]]
    return Warning(
        "Runs that did not end",
        "They are left out of every number here; the same command tries them again.",
        [f"{row.run}: {shorten(row.error or 'not finished', 240, placeholder=' ...')}" for row in left.itertuples()],
    )


def inert_reference(steps: pd.DataFrame) -> Warning:
    """Arms with a reference other than S that hardly changed the weight of any pair."""
    moved = steps[~steps["reference"].isin(["M_0", "none"])]
    leverage = moved.groupby(["arm", "t"], sort=False)["reference_leverage"].mean().groupby("arm", sort=False).max()
    return Warning(
        "The reference was inert",
        f"Reference leverage, the mean change of a pair's weight against S as reference, stayed below {INERT}: these "
        "arms could not show what a moving reference does. A larger beta, or more training, makes it matter.",
        [f"{arm}: leverage {value:.4f}" for arm, value in leverage.items() if value < INERT],
    )


def seen_by_reference(references: pd.DataFrame) -> Warning:
    """Steps whose reference had been trained on the step's own pairs."""
    seen = references[references["seen"]].groupby(["arm", "t", "model"], sort=False)["gamma"].mean()
    return Warning(
        "The reference had seen the pairs",
        "Its gamma there is memorisation, not alignment, and the bound that it sets is no measure of quality.",
        [f"{arm}, step {t}: {model}, mean gamma {gamma:.1f} nats" for (arm, t, model), gamma in seen.items()],
    )


def length_bias(measures: pd.DataFrame) -> Warning:
    """Where the last model's ranking accuracy is what preferring the shorter response would give."""
    last = _last(measures)
    cases = []
    for (arm, source), group in last.groupby(["arm", "source"], sort=False):
        means = group.groupby("name")["value"].mean()
        ranking, shorter = (means.get(f"preference/{name}_accuracy", float("nan")) for name in ("ranking", "shorter"))
        if abs(ranking - shorter) < NEAR:
            cases.append(f"{arm}, {source or 'all sources'}: {ranking:.3f}, shorter is better {shorter:.3f}")
    return Warning(
        "Ranking accuracy is close to “the shorter response is better”",
        "Summed log-probabilities favour short responses, so this accuracy may measure length alone.",
        cases,
    )


def displacement(measures: pd.DataFrame) -> Warning:
    """Arms that lowered the log-probability of the chosen responses as well."""
    moved = _last(measures).query("measure == 'preference/log_ratio_chosen'").dropna(subset="value")
    summary = collect.by_arm(moved, [])
    return Warning(
        "Displacement: chosen responses became less likely",
        "Margins grew because rejected responses fell further; probability went to responses that are in no pair.",
        [f"{row.arm}: log-ratio to S {row.value:.2f} nats" for row in summary.itertuples() if row.high < 0],
    )


def too_few_seeds(runs: pd.DataFrame) -> Warning:
    seeds = runs[runs["done"]].groupby("arm", sort=False)["seed"].nunique()
    few = seeds[[smallest_p(n) > LEVEL for n in seeds]]
    return Warning(
        "Too few seeds for a verdict",
        f"With fewer than six seeds no exact sign-flip test can reach p < {LEVEL}; read differences as hints.",
        [f"{arm}: {n} seed{'s' * (n > 1)}" for arm, n in few.items()],
    )


def _last(measures: pd.DataFrame) -> pd.DataFrame:
    """The measures of each run's last model."""
    return measures[measures["t"] == measures.groupby("run")["t"].transform("max")]
