"""The figures, one function each: from tables of `collect` to a matplotlib Figure. Filter a table to see less.

Lines are means over seeds and bands 95 % Student t intervals over seeds (with one seed: its own interval, over
prompts or pairs, where its evaluation has one). M_0 is S. More arms than colours get a panel each.
"""

from math import log

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import collect
from analysis.figure_style import COLOURS, by_panel, label_outer, legend, looks, panels, styled

SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
MOST_POINTS = 250  # of a line over updates; more are averaged in bins


@styled
def loss_curves(train: pd.DataFrame) -> Figure:
    """Training loss over the updates of all steps: single seeds, and their mean. A step's fresh start brings it back
    to the loss at zero margin."""
    width = max(1, train["overall_update"].max() // MOST_POINTS)
    binned = train.assign(overall_update=(train["overall_update"] - 1) // width * width + 1)
    groups = by_panel(list(train["arm"].unique()))
    from_zero = np.allclose(train.loc[train["update"] == 1, "loss"], log(2), atol=1e-2)
    figure, rows = panels(len(groups), sharex=True, sharey=True)
    for axes, (title, arms) in zip(rows, groups.items(), strict=True):
        for arm, look in looks(arms).items():
            look["marker"] = ""
            for t, step in binned[binned["arm"] == arm].groupby("t"):
                seeds = step.pivot_table(index="overall_update", columns="run", values="loss")
                axes.plot(seeds, **look | {"linewidth": 0.5, "alpha": 0.4})
                axes.plot(seeds.mean(axis=1), label=("_" if t > 1 else "mean" if title else arm), **look)
        if from_zero:
            axes.axhline(log(2), color="#000000", linewidth=0.8, linestyle=":", label="ln 2, all margins 0")
        axes.set(title=title, ylabel="training loss")
    rows[0].xaxis.get_major_locator().set_params(integer=True)
    label_outer(rows, "updates over all steps")
    legend(figure, rows[0])
    return figure


@styled
def frontier(measures: pd.DataFrame) -> Figure:
    """Gold reward against KL to S, from S through every step; beside it, where it was measured, best-of-n from S, which
    stands at the most that its KL can be."""
    gold, kl = (
        collect.by_arm(measures[measures["measure"] == name], ["t"]).set_index(["arm", "t"])
        for name in ("lab/gold", "lab/kl")
    )
    groups = by_panel(list(gold.index.unique("arm")))
    figure, rows = panels(len(groups), 3.2, sharex=True, sharey=True)
    for axes, (title, arms) in zip(rows, groups.items(), strict=True):
        for arm, points in gold.drop(index=arms, level="arm").groupby("arm"):
            axes.plot(kl.loc[arm]["value"], points["value"], color="#000000", linewidth=0.6, alpha=0.2)
        for arm, look in looks(arms).items():
            x, y, colour = kl.loc[arm], gold.loc[arm], look["color"]
            axes.plot(x["value"], y["value"], label="this arm, others grey" if title else arm, **look, mfc="none")
            axes.plot(x["value"].iloc[-1], y["value"].iloc[-1], color=colour, marker=look["marker"])
            axes.errorbar(x["value"], y["value"], _errors(y), _errors(x), ecolor=colour, fmt="none", elinewidth=0.8)
        _best_of_n(axes, measures)
        axes.set(title=title, ylabel="gold reward" if title else "gold reward (0 to 1)")
        _frame_points(axes)
    label_outer(rows, "KL(M_t, S) (nats)" if len(rows) > 1 else "KL(M_t, S) (nats a response)")
    legend(figure, rows[0])
    return figure


@styled
def reference_gammas(steps: pd.DataFrame, references: pd.DataFrame) -> Figure:
    """The bound of every step, before it trains: the mean of its reference's gamma over the chunk, and behind it the
    distribution over the pairs that are followed (their middle 95 %)."""
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
    """The paper's Figure 2: gamma of M_0 .. M_T on the pairs of one chunk that are followed, mean and middle 95 %.
    Hatched: models trained on these pairs, whose gamma is memorisation."""
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
    """Log-probabilities of chosen and rejected responses under M_0 .. M_T: the means, and some pairs behind them. The
    step that trains on a chunk is shaded; the model at the shade's left edge is the reference of `previous`."""
    ended = trajectory[(trajectory["update"] == -1)]
    chunks = sorted(ended["chunk"].unique(), key=lambda chunk: (chunk == 0, chunk))
    figure, rows = panels(len(chunks), 2.1, sharex=True)
    for axes, chunk in zip(rows, chunks, strict=True):
        group = ended[ended["chunk"] == chunk]
        ids = sorted(group["id"].unique())  # by source
        some = group[group["id"].isin(ids[:: -(-len(ids) // num_pairs)])]
        for side, look in zip(("chosen", "rejected"), looks(["chosen", "rejected"]).values(), strict=True):
            lines = some.pivot_table(index="t", columns=["run", "id"], values=f"{side}_logp")
            axes.plot(lines, color=look["color"], linestyle=look["linestyle"], linewidth=0.6, alpha=0.4)
            axes.plot(group.groupby("t")[f"{side}_logp"].mean(), label=f"{side}, mean", **look)
        if chunk:
            axes.axvspan(chunk - 1, chunk, color="#000000", alpha=0.08, linewidth=0)
        axes.set(title=f"pairs of chunk {chunk}" if chunk else "held-out pairs", ylabel="log-prob (nats)")
    _name_models(rows, ended["t"])
    legend(figure, rows[0])
    return figure


@styled
def memorisation(trajectory: pd.DataFrame) -> Figure:
    """How far gamma rose above that of S: on pairs trained on, on pairs still to come, on held-out ones."""
    ended = trajectory[trajectory["update"] == -1]
    rise = ended["gamma"] - ended.groupby(["run", "chunk", "id"])["gamma"].transform("first")
    groups = ["trained on", "still to come", "held out"]
    kind = np.select([ended["held_out"], ended["seen"]], ["held out", "trained on"], "still to come")
    per_run = ended.assign(rise=rise, kind=kind).groupby(["arm", "seed", "t", "kind"], as_index=False)["rise"].mean()
    figure, rows = panels(ended["arm"].nunique(), 1.9, sharex=True, sharey=True)
    for axes, arm in zip(rows, ended["arm"].unique(), strict=True):
        mine = per_run[per_run["arm"] == arm]
        for group, look in looks(groups).items():
            summary = collect.by_arm(mine[mine["kind"] == group], ["t"], "rise")
            _line(axes, summary, "t", group, look)
        axes.set(title=arm, ylabel="gamma over S (nats)")
    _name_models(rows, ended["t"])
    legend(figure, rows[0])
    return figure


@styled
def accuracy_by_source(measures: pd.DataFrame, name: str = "preference/ranking_accuracy") -> Figure:
    """Held-out accuracy of S and every M_t for each source; dotted, what "the shorter one is better" would score."""
    arms, by_source = measures["arm"].unique(), measures[measures["source"] != ""]
    styles = looks(list(by_source["source"].unique()))
    figure, rows = panels(len(arms), 2.0, sharex=True, sharey=True)
    for axes, arm in zip(rows, arms, strict=True):
        mine = by_source[by_source["arm"] == arm]
        for source, look in styles.items():
            here = mine[mine["source"] == source]
            if here.empty:  # another arm's source, named in the legend alone
                axes.plot([], [], label=source, **look)
                continue
            _line(axes, collect.by_arm(here[here["name"] == name], ["t"]), "t", source, look)
            shorter = here.loc[here["name"] == "preference/shorter_accuracy", "value"].mean()
            axes.axhline(shorter, color=look["color"], linewidth=0.9, linestyle=":")
        unit = "share" if name.endswith("accuracy") else "nats"
        axes.set(title=arm, ylabel=f"{name.rpartition('/')[2].replace('_', ' ')} ({unit})")
        if unit == "share":  # an interval of few seeds may leave what is possible
            axes.set_ylim(max(-0.02, axes.get_ylim()[0]), min(1.02, axes.get_ylim()[1]))
    _name_models(rows, measures["t"])
    legend(figure, rows[0])
    return figure


@styled
def displacement(measures: pd.DataFrame) -> Figure:
    """How far the chosen and the rejected held-out responses' log-probabilities moved from S; both often fall."""
    moved = measures[measures["measure"].str.startswith("preference/log_ratio_")].copy()
    moved.loc[moved["t"] == 0, ["value", "low", "high"]] = 0.0  # of S to itself
    arms = moved["arm"].unique()
    figure, rows = panels(len(arms), 1.9, sharex=True, sharey=True)
    for axes, arm in zip(rows, arms, strict=True):
        for side, look in looks(["chosen", "rejected"]).items():
            here = (moved["arm"] == arm) & (moved["measure"] == f"preference/log_ratio_{side}")
            _line(axes, collect.by_arm(moved[here], ["t"]), "t", f"{side} responses", look)
        axes.axhline(0, color="#000000", linewidth=0.8)
        axes.set(title=arm, ylabel="log-ratio to S (nats)")
    _name_models(rows, measures["t"])
    legend(figure, rows[0])
    return figure


@styled
def learning_order(trajectory: pd.DataFrame, pairs: pd.DataFrame, num_bins: int = 12) -> Figure:
    """Which pairs a model ranks right, and when: a chunk's pairs in order of the split's score (of gamma of S where
    there is none). The dashed line is where the chunk's step begins."""
    rows = trajectory[~trajectory["held_out"] & (trajectory["role"] == "policy")]
    inside = rows["update"].mask(rows["update"] < 0, np.inf)  # a step's end comes last
    rows = rows.assign(inside=inside).sort_values(["t", "inside"], kind="stable")
    own = "score" in pairs and pairs.loc[~pairs["held_out"], "score"].notna().all()
    if own:
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
        axes.set(title=f"chunk {chunk}", ylabel="score" if own else "gamma of S")
        axes.grid(visible=False)
        axes.set_yticks([0.5, len(right) - 0.5], ["lowest", "highest"])
    panel_rows[-1].set_xticks(np.arange(len(models)) + 0.5, [_model(name) for name in models])
    label_outer(panel_rows, "")
    figure.colorbar(mesh, ax=panel_rows, label="share ranked right (gamma > 0)")
    return figure


@styled
def sweep_cost(steps: pd.DataFrame, train: pd.DataFrame) -> Figure:
    """Seconds of training that a sweep's steps take when every run trains its own, and when equal steps are shared."""
    seconds = train.groupby(["run", "t"])["seconds"].sum().rename("cost").reset_index()
    costs = steps[["run", "arm", "t", "key"]].merge(seconds, on=["run", "t"])
    shared = costs.drop_duplicates("key")
    figure, (axes,) = panels(height=1.1)
    totals = {"every run for itself": costs, "equal steps shared": shared}
    bars = axes.barh(list(totals), [table["cost"].sum() for table in totals.values()], color=COLOURS[0], height=0.6)
    axes.bar_label(bars, [f"{table['cost'].sum():.0f} s, {len(table)} steps" for table in totals.values()], padding=3)
    axes.margins(x=0.6)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="seconds of training, one run at a time")
    return figure


def _line(axes: Axes, summary: pd.DataFrame, x: str, label: str, look: dict) -> None:
    """A line with its band, from a table made by `collect.by_arm`."""
    axes.plot(summary[x], summary["value"], label=label, **look)
    if not summary.empty:
        axes.fill_between(summary[x], summary["low"], summary["high"], color=look["color"], alpha=0.15, linewidth=0)


def _frame_points(axes: Axes) -> None:
    """Show all points; an interval of few seeds may leave the picture, as it leaves what is possible."""
    x, y = (np.concatenate([getattr(line, f"get_{side}data")() for line in axes.lines]) for side in "xy")
    right, margin = x.max() or 1.0, 0.08 * (np.ptp(y) or 1.0)
    axes.set(xlim=(-0.02 * right, 1.1 * right), ylim=(max(0.0, y.min() - margin), min(1.0, y.max() + margin) + 0.01))


def _errors(summary: pd.DataFrame) -> np.ndarray:
    """Distances to the interval's ends, as matplotlib wants them; none where there is no interval."""
    return np.nan_to_num([summary["value"] - summary["low"], summary["high"] - summary["value"]])


def _best_of_n(axes: Axes, measures: pd.DataFrame) -> None:
    """Best of n answers of S by gold; its KL to S is at most log n - (n - 1)/n (2401.01879)."""
    rows = measures[measures["measure"].str.startswith("lab/best_of/")].groupby("measure")["value"].mean()
    if rows.empty:
        return
    n = np.array([int(name.rpartition("/")[2]) for name in rows.index])
    order = np.argsort(n)
    kl = np.log(n) - (n - 1) / n
    axes.plot(kl[order], rows.to_numpy()[order], "-", color="#000000", linewidth=0.9, label="best of n from S, by gold")
    for i in order[1:]:
        axes.annotate(f"{n[i]}", (kl[i], rows.iloc[i]), (3, -9), textcoords="offset points", fontsize=7)


def _violins(axes: Axes, groups: dict[int, pd.Series], colour: str, hatch: str | None = None) -> None:
    """The middle 95 % of the values at each key; a few very long responses would flatten the rest."""
    middle = [values[values.between(*values.quantile([0.025, 0.975]))] for values in groups.values()]
    if middle:
        parts = axes.violinplot(middle, list(groups), showextrema=False)
        for body in parts["bodies"]:
            body.set(facecolor=colour, alpha=0.3, edgecolor=colour, hatch=hatch)


def _means(axes: Axes, summary: pd.DataFrame) -> None:
    """Means with their intervals, of one arm, and their values along the top."""
    axes.errorbar(summary["t"], summary["value"], _errors(summary), fmt="o", color="#000000", capsize=3)
    for t, value in zip(summary["t"], summary["value"], strict=True):
        axes.annotate(f"{value:.1f}", (t, 1), xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=9)
    axes.margins(y=0.15)
    axes.axhline(0, color="#000000", linewidth=0.8)


def _name_models(rows: list[Axes], t: pd.Series) -> None:
    """The models along the x axis that the panels share."""
    ticks = sorted(t.unique())
    rows[-1].set_xticks(ticks, [_model(f"M_{t}") for t in ticks])
    label_outer(rows, "model")


def _model(name: str) -> str:
    """M_1 as M₁; M_0 is S."""
    return "S" if name == "M_0" else name.replace("M_", "M").translate(SUBSCRIPTS) if name[0] == "M" else name
