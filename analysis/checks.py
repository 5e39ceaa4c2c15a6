"""Reasons to doubt the results of a run or a sweep, each with the arms or runs that it concerns."""

from textwrap import shorten
from typing import NamedTuple

import pandas as pd

from analysis import collect
from analysis.significance import INERT, LEFT_S, LEVEL, smallest_p

NEAR = 0.03  # an accuracy this close to a baseline gives no evidence against the baseline


class Warning(NamedTuple):
    title: str
    sentence: str
    cases: list[str]


def warnings(
    runs: pd.DataFrame, measures: pd.DataFrame, steps: pd.DataFrame, references: pd.DataFrame
) -> list[Warning]:
    """All warnings that apply, the gravest first. The arguments are tables of `collect`."""
    found = [
        unfinished(runs),
        left_start(measures),
        inert_reference(steps),
        seen_by_reference(references),
        length_bias(measures),
        displacement(measures),
        equal_seeds(steps),
        too_few_seeds(runs),
    ]
    return [warning for warning in found if warning.cases]


def unfinished(runs: pd.DataFrame) -> Warning:
    """Runs that failed or were interrupted."""
    left = runs[~runs["done"]]
    return Warning(
        "Runs that did not finish",
        "No number here includes them. The same command runs them again.",
        [f"{row.run}: {shorten(row.error or 'not finished', 240, placeholder=' ...')}" for row in left.itertuples()],
    )


def left_start(measures: pd.DataFrame) -> Warning:
    """Runs of the laboratory that went so far from S that one of them moves the mean of its arm."""
    far = measures[(measures["measure"] == "lab/kl") & (measures["value"] > LEFT_S)]
    return Warning(
        "A seed left S",
        f"Its KL to S is above {LEFT_S:g} nats, so its answers have little to do with S. Such a seed decides the mean "
        "and the interval of its arm; read the medians, and lower the learning rate or raise beta.",
        [f"{row.arm}, seed {row.seed}: KL {row.value:.1f} nats after step {row.t}" for row in far.itertuples()],
    )


def inert_reference(steps: pd.DataFrame) -> Warning:
    """Arms whose reference, though not S, hardly changed the gradient weight of any pair."""
    moved = steps[~steps["reference"].isin(["M_0", "none"])]
    leverage = moved.groupby(["arm", "t"], sort=False)["reference_leverage"].mean().groupby("arm", sort=False).max()
    return Warning(
        "The reference was inert",
        "Leverage is the mean absolute change of a pair's gradient weight if the reference were S. It stayed below "
        f"{INERT}: these arms cannot show what a moving reference does. If the last losses are near ln 2, a larger "
        "beta or more training would raise it; if they are near 0, the pairs are learnt and weigh nothing: train less.",
        [f"{arm}: leverage {value:.4f}" for arm, value in leverage.items() if value < INERT],
    )


def seen_by_reference(references: pd.DataFrame) -> Warning:
    """Steps whose reference was trained on the step's own pairs."""
    seen = references[references["seen"]].groupby(["arm", "t", "model"], sort=False)["gamma"].mean()
    return Warning(
        "The reference was trained on the pairs",
        "Its gamma on these pairs measures memorisation, not alignment, so a high bound is not a good bound.",
        [f"{arm}, step {t}: {model}, mean gamma {gamma:.1f} nats" for (arm, t, model), gamma in seen.items()],
    )


def length_bias(measures: pd.DataFrame) -> Warning:
    """Arms whose last model ranks pairs no better than a rule that prefers the shorter response."""
    cases = []
    for (arm, source), group in collect.last(measures).groupby(["arm", "source"], sort=False):
        means = group.groupby("name")["value"].mean()
        ranking, shorter = (means.get(f"preference/{name}_accuracy", float("nan")) for name in ("ranking", "shorter"))
        if abs(ranking - shorter) < NEAR:
            cases.append(f"{arm}, {source or 'all sources'}: {ranking:.3f}, shorter is better {shorter:.3f}")
    return Warning(
        "Ranking accuracy is close to “the shorter response is better”",
        "Summed log-probabilities favour short responses, so this accuracy may measure only length.",
        cases,
    )


def displacement(measures: pd.DataFrame) -> Warning:
    """Arms whose last model gives the chosen and the rejected responses less probability than S does."""
    last, name = collect.last(measures), "preference/log_ratio_"
    chosen, rejected = (
        collect.by_arm(last[last["measure"] == name + side].dropna(subset="value"), [])
        for side in ("chosen", "rejected")
    )
    both = chosen.merge(rejected, on="arm", suffixes=("", "_rejected"))
    return Warning(
        "Displacement: both rewards fell",
        "The loss reads the difference of the two rewards alone, so it can fall while the model makes the chosen "
        "responses less likely too; their probability went to responses that are in no pair. Better margins and "
        "accuracies are then no sign of better answers: read what evaluate=generate shows, or keep the chosen "
        "responses likely with loss=rpo or loss=dpop.",
        [
            f"{row.arm}: log-ratio to S {row.value:.2f} nats (chosen), {row.value_rejected:.2f} nats (rejected)"
            for row in both.itertuples()
            if max(row.high, row.high_rejected) < 0
        ],
    )


def equal_seeds(steps: pd.DataFrame) -> Warning:
    """Arms whose seeds ended every step with the same loss, to the last bit: the seeds changed nothing."""
    seeds = steps.groupby("arm", sort=False)["seed"].nunique()
    differs = steps.groupby(["arm", "t"], sort=False)["last_loss"].nunique().groupby("arm", sort=False).max() > 1
    return Warning(
        "Seeds changed nothing",
        "They redraw the order of pairs and random chunks, and here that made no difference, so these intervals say "
        "nothing. In the laboratory, model.seed=${seed} data.seed=${seed} redraw S and the pairs, too.",
        [f"{arm}: {n} equal seeds" for arm, n in seeds.items() if n > 1 and not differs[arm]],
    )


def too_few_seeds(runs: pd.DataFrame) -> Warning:
    """Arms with too few seeds for an exact test to reach the significance level."""
    seeds = runs[runs["done"]].groupby("arm", sort=False)["seed"].nunique()
    few = seeds[[smallest_p(n) > LEVEL for n in seeds]]
    return Warning(
        "Too few seeds for a verdict",
        f"With fewer than six seeds an exact sign-flip test cannot reach p < {LEVEL}; take differences as hints.",
        [f"{arm}: {n} seed{'s' * (n > 1)}" for arm, n in few.items()],
    )
