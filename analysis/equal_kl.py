"""Is an arm better than plain DPO, or only further from S? Gold reward above plain DPO's line, at equal KL to S.

A moving reference is, first of all, a smaller beta: it buys reward with KL. So an arm is compared with the line that
plain DPO (one step, reference S, the same loss) draws from S through its own arms, one for every beta that was run.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from analysis import collect
from analysis.statistics import over_seeds, sign_flip

AXES = ["lab/kl", "lab/gold"]


def above_plain(*paths: Path | str) -> pd.DataFrame:
    """One row per arm that is not plain DPO: arm, gain at equal KL (an `Interval` over seeds), p, seeds, beyond.

    The line is straight between models. `beyond` counts the seeds whose KL is larger than any of plain DPO's: there
    is no line there, and they are left out. No rows where gold reward and KL were not measured, or plain DPO not run.
    """
    measures, runs = collect.measures(*paths), collect.runs(*paths)
    points = measures[measures["measure"].isin(AXES)].pivot(index=["run", "t"], columns="measure", values="value")
    plain = _plain(collect.steps(*paths))
    if not set(AXES) <= set(points) or not len(plain):
        return pd.DataFrame()
    ended = runs[runs["done"]].rename(columns={"choices.loss": "loss"}).set_index("run")
    rows = []
    for arm, group in ended[~ended.index.isin(plain)].groupby("arm", sort=False):
        gains = [_gain(run.Index, run.seed, run.loss, points, ended.loc[plain]) for run in group.itertuples()]
        inside = [gain for gain in gains if not np.isnan(gain)]
        gain, p = over_seeds(inside), sign_flip(inside)
        rows.append({"arm": arm, "gain at equal KL": gain, "seeds": gain.n, "p": p, "beyond": len(gains) - gain.n})
    return pd.DataFrame(rows)


def _plain(steps: pd.DataFrame) -> list[str]:
    """The runs of one step with S as reference."""
    by_run = steps.groupby("run", sort=False).agg(num_steps=("t", "max"), reference=("reference", "last"))
    return list(by_run.index[(by_run["num_steps"] == 1) & (by_run["reference"] == "M_0")])


def _gain(run: str, seed: int, loss: str, points: pd.DataFrame, plain: pd.DataFrame) -> float:
    """Gold reward of a run's last model above the line of its seed; nan beyond the line's end."""
    line = points.loc[plain.index[(plain["seed"] == seed) & (plain["loss"] == loss)]].sort_values("lab/kl")
    if line.empty:
        return float("nan")
    kl, gold = points.loc[run].iloc[-1][AXES]
    return gold - np.interp(kl, line["lab/kl"], line["lab/gold"], right=float("nan"))
