"""Gold reward above plain DPO at equal KL to S: is an arm better than plain DPO, or only further from S?

A moving reference acts, first of all, like a smaller beta: it reaches more reward with more KL. So each arm is compared
with the line of plain DPO (one step, reference S, the same loss) in the plane of KL and gold reward. The line starts at
S and passes through the last models of plain DPO, one for each beta that was run.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis import collect
from analysis.significance import sign_flip
from sdpo.stats import student

AXES = ["lab/kl", "lab/gold"]


def above_plain(*paths: Path | str) -> pd.DataFrame:
    """One row per arm that is not plain DPO: arm, gain at equal KL (an `Interval` over seeds), p, seeds, beyond.

    `beyond` counts the seeds whose gain is nan. The table is empty if gold reward and KL were not measured, or if plain
    DPO was not run.
    """
    rows = []
    for arm, group in gains(*paths).query("not plain").groupby("arm", sort=False):
        inside = group["gain"].dropna().tolist()
        gain, p = student(inside), sign_flip(inside)
        rows.append({"arm": arm, "gain at equal KL": gain, "seeds": gain.n, "p": p, "beyond": len(group) - gain.n})
    return pd.DataFrame(rows)


def gains(*paths: Path | str) -> pd.DataFrame:
    """One row per run: arm, seed, plain, gain (gold reward above plain DPO's line at the run's own KL to S).

    The line is straight between models. It ends at the largest KL of plain DPO; beyond that the gain is nan.
    """
    measures, runs = collect.measures(*paths), collect.runs(*paths)
    points = measures[measures["measure"].isin(AXES)].pivot(index=["run", "t"], columns="measure", values="value")
    plain = _plain(collect.steps(*paths))
    rows = []
    if set(AXES) <= set(points) and len(plain):
        ended = runs[runs["done"]].rename(columns={"choices.loss": "loss"}).set_index("run")
        for run in ended.itertuples():
            gain = _gain(points.loc[run.Index].iloc[-1], points.loc[_line(run, ended.loc[plain])])
            rows.append((run.arm, run.seed, run.Index in plain, gain))
    return pd.DataFrame(rows, columns=["arm", "seed", "plain", "gain"])


def _plain(steps: pd.DataFrame) -> list[str]:
    """The names of the runs with one step and S as reference."""
    by_run = steps.groupby("run", sort=False).agg(num_steps=("t", "max"), reference=("reference", "last"))
    return list(by_run.index[(by_run["num_steps"] == 1) & (by_run["reference"] == "M_0")])


def _line(run: NamedTuple, plain: pd.DataFrame) -> pd.Index:
    """The runs of plain DPO with the same seed, loss and S as this run."""
    same = [plain[name] == getattr(run, name) for name in ("seed", "loss", "model_key")]
    return plain.index[np.logical_and.reduce(same)]


def _gain(last: pd.Series, line: pd.DataFrame) -> float:
    """Gold reward of a run's last model minus the line of plain DPO at the same KL; nan beyond the end of the line."""
    if line.empty:
        return float("nan")
    line = line.sort_values("lab/kl")
    kl, gold = last[AXES]
    return gold - np.interp(kl, line["lab/kl"], line["lab/gold"], right=float("nan"))
