"""Gold reward above plain DPO at equal KL to S: is an arm better than plain DPO, or only further from S?

A moving reference acts, first of all, like a smaller beta: it reaches more reward with more KL. So each arm is compared
with the line of plain DPO (one step, reference S, the same loss) in the plane of KL and gold reward. The line starts at
S and passes through the last models of plain DPO, one for each beta that was run. If plain runs differ in more than
beta, such as in epochs or pairs, there is a line for each of these settings, and an arm is compared with its own.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from analysis import collect
from analysis.significance import sign_flip
from sdpo.stats import student

AXES = ["lab/kl", "lab/gold"]
SECTIONS = ("data", "split", "score", "rounds", "tune", "loss", "optim", "steps")  # that decide what plain DPO trains
TRAINING = tuple(f"settings.{section}." for section in SECTIONS)


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
    measures, runs = collect.measures(*paths), collect.runs(*paths).set_index("run")
    points = measures[measures["measure"].isin(AXES)].pivot(index=["run", "t"], columns="measure", values="value")
    ended = runs[runs["done"]].join(collect.settings(*paths).set_index("run").filter(like="settings."))
    plain = ended.loc[_plain(collect.steps(*paths))]
    rows = []
    if set(AXES) <= set(points) and len(plain):
        shared = ["seed", "model_key", "choices.loss", *_varied(plain)]
        for name, run in ended.iterrows():
            line = points.loc[plain.index[(plain[shared] == run[shared]).all(axis=1)]]
            gain = _gain(points.loc[name].iloc[-1], line)
            rows.append((run["arm"], run["seed"], name in plain.index, gain))
    return pd.DataFrame(rows, columns=["arm", "seed", "plain", "gain"])


def _plain(steps: pd.DataFrame) -> list[str]:
    """The names of the runs with one step and S as reference."""
    by_run = steps.groupby("run", sort=False).agg(num_steps=("t", "max"), reference=("reference", "last"))
    return list(by_run.index[(by_run["num_steps"] == 1) & (by_run["reference"] == "M_0")])


def _varied(plain: pd.DataFrame) -> list[str]:
    """The settings other than beta in which runs of plain DPO differ."""
    settings = [name for name in plain if name.startswith(TRAINING) and name != "settings.loss.beta"]
    return [name for name in settings if plain[name].nunique() > 1]


def _gain(last: pd.Series, line: pd.DataFrame) -> float:
    """Gold reward of a run's last model minus the line of plain DPO at the same KL; nan beyond the end of the line."""
    if line.empty:
        return float("nan")
    line = line.sort_values("lab/kl")
    kl, gold = last[AXES]
    return gold - np.interp(kl, line["lab/kl"], line["lab/gold"], right=float("nan"))
