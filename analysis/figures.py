"""The figures: each function takes tables of `collect` and returns a matplotlib Figure. Filter a table to see less.

Lines are means over seeds, bands are 95 % Student t intervals over seeds. With one seed the band is the interval of its
own evaluation, over prompts or pairs, if it has one. M_0 is S. If there are more arms than colours, each gets a panel.
The docstring of a figure function is the caption of the figure on the report page.
"""

from math import log
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import collect
from analysis.figure_style import COLOURS, by_panel, label_outer, legend, panels, series_styles, styled

SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
MOST_POINTS = 250  # per line over updates; the updates of longer lines are averaged in bins


@styled
def loss_curves(train: pd.DataFrame) -> Figure:
    """Training loss over the updates of all steps: thin lines are single seeds, thick lines their mean. Each step
    starts again at the loss at zero margin if its reference is its start."""
    width = max(1, train["overall_update"].max() // MOST_POINTS)
    binned = train.assign(overall_update=(train["overall_update"] - 1) // width * width + 1)
    groups = by_panel(list(train["arm"].unique()))
    from_zero = np.allclose(train.loc[train["update"] == 1, "loss"], log(2), atol=1e-2)
    figure, rows = panels(len(groups), sharex=True, sharey=True)
    for axes, (title, arms) in zip(rows, groups.items(), strict=True):
        for arm, style in series_styles(arms).items():
            for t, step in binned[binned["arm"] == arm].groupby("t"):
                seeds = step.pivot_table(index="overall_update", columns="run", values="loss")
                style["marker"] = "." if len(seeds) == 1 else ""  # a line of one point would not be seen
                axes.plot(seeds, **style | {"linewidth": 0.5, "alpha": 0.4})
                axes.plot(seeds.mean(axis=1), label=("_" if t > 1 else "mean" if title else arm), **style)
        if from_zero:
            axes.axhline(log(2), color="#000000", linewidth=0.8, linestyle=":", label="ln 2, all margins 0")
        axes.set(title=title, ylabel="training loss")
    rows[0].locator_params(axis="x", integer=True)
    label_outer(rows, "updates over all steps")
    legend(figure, rows[0])
    return figure


@styled
def frontier(measures: pd.DataFrame) -> Figure:
    """Gold reward against KL to S, from S through every step. If it was measured, best-of-n sampling from S is drawn,
    too, at an upper bound of its KL."""
    gold, kl = (
        collect.by_arm(measures[measures["measure"] == name], ["t"]).set_index(["arm", "t"])
        for name in ("lab/gold", "lab/kl")
    )
    groups = by_panel(list(gold.index.unique("arm")))
    figure, rows = panels(len(groups), 3.2, sharex=True, sharey=True)
    for axes, (title, arms) in zip(rows, groups.items(), strict=True):
        for arm, points in gold.drop(index=arms, level="arm").groupby("arm"):
            axes.plot(kl.loc[arm]["value"], points["value"], color="#000000", linewidth=0.6, alpha=0.2)
        for arm, style in series_styles(arms).items():
            x, y, colour = kl.loc[arm], gold.loc[arm], style["color"]
            axes.plot(x["value"], y["value"], label="this arm, others grey" if title else arm, **style, mfc="none")
            axes.plot(x["value"].iloc[-1], y["value"].iloc[-1], color=colour, marker=style["marker"])
            axes.errorbar(x["value"], y["value"], _errors(y), _errors(x), ecolor=colour, fmt="none", elinewidth=0.8)
        _best_of_n(axes, measures)
        axes.set(title=title, ylabel="gold reward" if title else "gold reward (0 to 1)")
        _frame_points(axes)
    label_outer(rows, "KL(M_t, S) (nats)" if len(rows) > 1 else "KL(M_t, S) (nats a response)")
    legend(figure, rows[0])
    return figure


@styled
def reference_gammas(steps: pd.DataFrame, references: pd.DataFrame) -> Figure:
    """The bound of every step before it trains: the mean gamma of its reference over the chunk, and the distribution
    over the probe pairs (middle 95 %)."""
    arms = steps["arm"].unique()
    figure, rows = panels(len(arms), 1.9, sharex=True, sharey=True)
    for axes, arm in zip(rows, arms, strict=True):
        _violins(axes, dict(iter(references[references["arm"] == arm].groupby("t")["gamma"])), COLOURS[0])
        _means(axes, collect.by_arm(steps[steps["arm"] == arm], ["t"], "gamma_ref_mean"))
        axes.set(title=arm, ylabel="gamma_ref (nats)", xticks=sorted(steps["t"].unique()))
    label_outer(rows, "step")
    return figure


@styled
def gammas_of_models(trajectory: pd.DataFrame, chunk: int) -> Figure:
    """The paper's Figure 2: gamma of M_0 .. M_T on the probe pairs of one chunk, mean and middle 95 %. Hatched: models
    that were trained on these pairs, so that their gamma measures memorisation."""
    rows = trajectory[(trajectory["chunk"] == chunk) & (trajectory["update"] == -1)]
    seen = rows.groupby("t")["seen"].all()
    groups = dict(iter(rows.groupby("t")["gamma"]))
    figure, (axes,) = panels()
    _violins(axes, {t: group for t, group in groups.items() if not seen[t]}, COLOURS[0])
    _violins(axes, {t: group for t, group in groups.items() if seen[t]}, COLOURS[1], hatch="////")
    per_run = rows.groupby(["arm", "seed", "t"], as_index=False)["gamma"].mean()
    _means(axes, collect.by_arm(per_run, ["t"], "gamma"))
    axes.set(ylabel=f"gamma on chunk {chunk} (nats)")
    _name_models([axes], rows["t"])
    return figure


@styled
def trajectories(trajectory: pd.DataFrame, num_pairs: int = 12) -> Figure:
    """Log-probabilities of chosen and rejected responses under M_0 .. M_T: thick lines are means, thin lines single
    pairs. The shaded step trains on the pairs; with `reference=previous` the model at the left edge of the shade is its
    reference."""
    ended = trajectory[(trajectory["update"] == -1)]
    chunks = sorted(ended["chunk"].unique(), key=lambda chunk: (chunk == 0, chunk))
    figure, rows = panels(len(chunks), 2.1, sharex=True)
    for axes, chunk in zip(rows, chunks, strict=True):
        group = ended[ended["chunk"] == chunk]
        ids = sorted(group["id"].unique())  # by source
        some = group[group["id"].isin(ids[:: -(-len(ids) // num_pairs)])]
        for side, style in series_styles(["chosen", "rejected"]).items():
            lines = some.pivot_table(index="t", columns=["run", "id"], values=f"{side}_logp")
            axes.plot(lines, color=style["color"], linestyle=style["linestyle"], linewidth=0.6, alpha=0.4)
            axes.plot(group.groupby("t")[f"{side}_logp"].mean(), label=f"{side}, mean", **style)
        if chunk:
            axes.axvspan(chunk - 1, chunk, color="#000000", alpha=0.08, linewidth=0)
        axes.set(title=f"pairs of chunk {chunk}" if chunk else "held-out pairs", ylabel="log-prob (nats)")
    _name_models(rows, ended["t"])
    legend(figure, rows[0])
    return figure


@styled
def memorisation(trajectory: pd.DataFrame) -> Figure:
    """How far gamma rose above gamma of S: on pairs trained on, on pairs still to come, and on held-out pairs."""
    ended = trajectory[trajectory["update"] == -1]
    rise = ended["gamma"] - ended.groupby(["run", "chunk", "id"])["gamma"].transform("first")
    groups = ["trained on", "still to come", "held out"]
    kind = np.select([ended["held_out"], ended["seen"]], ["held out", "trained on"], "still to come")
    by_run = ended.assign(rise=rise, kind=kind).groupby(["arm", "seed", "t", "kind"], as_index=False, sort=False)
    per_run = by_run["rise"].mean()
    return _lines_over_models(per_run, "kind", groups, "gamma over S (nats)", "rise")


@styled
def accuracy_by_source(measures: pd.DataFrame, name: str = "preference/ranking_accuracy") -> Figure:
    """Held-out accuracy of S and every M_t for each source. Dotted: the accuracy of "the shorter one is better"."""
    by_source = measures[measures["source"] != ""]
    unit = "share" if name.endswith("accuracy") else "nats"
    ylabel = f"{name.rpartition('/')[2].replace('_', ' ')} ({unit})"
    shown, sources = by_source[by_source["name"] == name], list(by_source["source"].unique())
    figure = _lines_over_models(shown, "source", sources, ylabel)
    shorter = by_source[by_source["name"] == "preference/shorter_accuracy"].groupby(["arm", "source"])["value"].mean()
    for axes in figure.axes:
        for source, accuracy in shorter[axes.get_title(loc="left")].items():
            axes.axhline(accuracy, color=series_styles(sources)[source]["color"], linewidth=0.9, linestyle=":")
        if unit == "share":  # an interval over few seeds may exceed 0 or 1
            axes.set_ylim(max(-0.02, axes.get_ylim()[0]), min(1.02, axes.get_ylim()[1]))
    return figure


@styled
def displacement(measures: pd.DataFrame) -> Figure:
    """Change of the log-probabilities of chosen and rejected held-out responses from S. Often both fall."""
    moved = measures[measures["measure"].str.startswith("preference/log_ratio_")].copy()
    moved.loc[moved["t"] == 0, ["value", "low", "high"]] = 0.0  # S against itself
    moved["side"] = moved["measure"].str.removeprefix("preference/log_ratio_") + " responses"
    figure = _lines_over_models(moved, "side", ["chosen responses", "rejected responses"], "log-ratio to S (nats)")
    for axes in figure.axes:
        axes.axhline(0, color="#000000", linewidth=0.8)
    return figure


@styled
def learning_order(trajectory: pd.DataFrame, pairs: pd.DataFrame, num_bins: int = 12) -> Figure:
    """Which pairs a model ranks correctly, and when. The pairs of a chunk are ordered by the score of the split, or by
    gamma of S if there is no score. The dashed line marks where the step of the chunk begins."""
    rows = trajectory[~trajectory["held_out"] & (trajectory["role"] == "policy")]
    inside = rows["update"].mask(rows["update"] < 0, np.inf)  # a step's end comes last
    rows = rows.assign(inside=inside).sort_values(["t", "inside"], kind="stable")
    has_scores = "score" in pairs and pairs.loc[~pairs["held_out"], "score"].notna().all()
    if has_scores:
        rows = rows.merge(pairs[["run", "id", "score"]])
    else:
        rows["score"] = rows.groupby(["run", "id"])["gamma"].transform("first")
    models, chunks = rows["model"].unique(), sorted(rows["chunk"].unique())
    figure, panel_rows = panels(len(chunks), 1.9, sharex=True)
    for axes, chunk in zip(panel_rows, chunks, strict=True):
        here = rows[rows["chunk"] == chunk]
        bins = np.ceil(here.groupby("model")["score"].rank(pct=True, method="first") * num_bins)
        right = (here["gamma"] > 0).groupby([bins, here["model"]]).mean().unstack().reindex(columns=models)
        mesh = axes.pcolormesh(right, cmap=colormaps["cividis"].resampled(10), vmin=0, vmax=1, edgecolors="face")
        axes.axvline(list(models).index(f"M_{chunk - 1}") + 1, color="#000000", linestyle="--")
        axes.set(title=f"chunk {chunk}", ylabel="score" if has_scores else "gamma of S")
        axes.grid(visible=False)
        axes.set_yticks([0.5, len(right) - 0.5], ["lowest", "highest"])
    panel_rows[-1].set_xticks(np.arange(len(models)) + 0.5, [_model(name) for name in models])
    label_outer(panel_rows, "model")
    figure.colorbar(mesh, ax=panel_rows, label="share with gamma > 0")
    return figure


@styled
def sweep_cost(steps: pd.DataFrame, train: pd.DataFrame) -> Figure:
    """Seconds of training in a sweep if every run trained all its steps, and with equal steps shared between runs."""
    seconds = train.groupby(["run", "t"])["seconds"].sum().rename("cost").reset_index()
    costs = steps[["run", "arm", "t", "key"]].merge(seconds, on=["run", "t"])
    shared = costs.drop_duplicates("key")
    figure, (axes,) = panels(height=1.1)
    totals = {"every run trains all": costs, "equal steps shared": shared}
    bars = axes.barh(list(totals), [table["cost"].sum() for table in totals.values()], color=COLOURS[0], height=0.6)
    axes.bar_label(bars, [f"{table['cost'].sum():.0f} s, {len(table)} steps" for table in totals.values()], padding=3)
    axes.margins(x=0.6)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="seconds of training, one run at a time")
    return figure


def _lines_over_models(table: pd.DataFrame, by: str, names: list[str], ylabel: str, column: str = "value") -> Figure:
    """A panel per arm, with a line and its band over S and every M_t for each of the names in the column `by`."""
    arms = table["arm"].unique()
    figure, rows = panels(len(arms), 1.9, sharex=True, sharey=True)
    for axes, arm in zip(rows, arms, strict=True):
        for name, style in series_styles(names).items():
            line = collect.by_arm(table[(table["arm"] == arm) & (table[by] == name)], ["t"], column)
            axes.plot(line["t"], line["value"], label=name, **style)  # the legend names also what this arm lacks
            if not line.empty:
                axes.fill_between(line["t"], line["low"], line["high"], color=style["color"], alpha=0.15, linewidth=0)
        axes.set(title=arm, ylabel=ylabel)
    _name_models(rows, table["t"])
    legend(figure, rows[0])
    return figure


def _frame_points(axes: Axes) -> None:
    """Fit the limits to the points; wide intervals over few seeds may leave the picture."""
    x, y = (np.concatenate([getattr(line, f"get_{side}data")() for line in axes.lines]) for side in "xy")
    right, margin = x.max() or 1.0, 0.08 * (np.ptp(y) or 1.0)
    axes.set(xlim=(-0.02 * right, 1.1 * right), ylim=(max(0.0, y.min() - margin), min(1.0, y.max() + margin) + 0.01))


def _errors(summary: pd.DataFrame) -> np.ndarray:
    """Distances from the values to the ends of their intervals, as matplotlib wants them; 0 without an interval."""
    return np.nan_to_num([summary["value"] - summary["low"], summary["high"] - summary["value"]])


def _best_of_n(axes: Axes, measures: pd.DataFrame) -> None:
    """The best of n answers of S by gold reward. Its KL to S is at most log n - (n - 1)/n (arXiv 2401.01879)."""
    rows = measures[measures["measure"].str.startswith("lab/best_of/")]
    gold = rows.groupby(rows["measure"].str.removeprefix("lab/best_of/").astype(int))["value"].mean()
    kl = [log(n) - (n - 1) / n for n in gold.index]
    if kl:
        axes.plot(kl, gold, "-", color="#000000", linewidth=0.9, label="best of n from S, by gold")
    for n, x, y in list(zip(gold.index, kl, gold, strict=True))[1:]:
        axes.annotate(f"{n}", (x, y), (3, -9), textcoords="offset points", fontsize=7)


def _violins(axes: Axes, groups: dict[int, pd.Series], colour: str, hatch: str | None = None) -> None:
    """Violins of the middle 95 % of the values at each key: a few very long responses would flatten the rest."""
    middle = [values[values.between(*values.quantile([0.025, 0.975]))] for values in groups.values()]
    if middle:
        parts: dict[str, Any] = dict(axes.violinplot(middle, list(groups), showextrema=False))
        for body in parts["bodies"]:
            body.set(facecolor=colour, alpha=0.3, edgecolor=colour, hatch=hatch)


def _means(axes: Axes, summary: pd.DataFrame) -> None:
    """The means of one arm with their intervals, and the values of the means along the top."""
    axes.errorbar(summary["t"], summary["value"], _errors(summary), fmt="o", color="#000000", capsize=3)
    for t, value in zip(summary["t"], summary["value"], strict=True):
        axes.annotate(f"{value:.1f}", (t, 1), xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=9)
    axes.margins(y=0.15)
    axes.axhline(0, color="#000000", linewidth=0.8)


def _name_models(rows: list[Axes], t: pd.Series) -> None:
    """Name the models on the x axis that the panels share."""
    ticks = sorted(t.unique())
    rows[-1].set_xticks(ticks, [_model(f"M_{t}") for t in ticks])
    label_outer(rows, "model")


def _model(name: str) -> str:
    """M₁ for M_1, and S for M_0."""
    return "S" if name == "M_0" else name.replace("M_", "M").translate(SUBSCRIPTS) if name[0] == "M" else name
