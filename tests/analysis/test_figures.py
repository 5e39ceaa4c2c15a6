"""Figures show the numbers of the tables; axes are labelled, graphics are vectors, no legend covers data."""

import xml.etree.ElementTree as xml

import matplotlib
import pandas as pd
import pytest
from runs import make_run, make_sweep

from analysis import collect, figure_style, figures


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return make_sweep(tmp_path_factory.mktemp("out") / "synthetic")


@pytest.fixture(scope="module")
def drawn(sweep):
    run = sweep / "stepwise-s1"
    measures, trajectory = collect.measures(sweep), collect.trajectory(run)
    return {
        "loss_curves": figures.loss_curves(collect.train(sweep)),
        "frontier": figures.frontier(measures),
        "reference_gammas": figures.reference_gammas(collect.steps(sweep), collect.references(sweep)),
        "gammas_of_models": figures.gammas_of_models(trajectory, 2),
        "trajectories": figures.trajectories(trajectory),
        "memorisation": figures.memorisation(collect.trajectory(sweep)),
        "accuracy_by_source": figures.accuracy_by_source(measures),
        "displacement": figures.displacement(measures),
        "learning_order": figures.learning_order(trajectory, collect.pairs(run)),
        "sweep_cost": figures.sweep_cost(collect.steps(sweep), collect.train(sweep)),
    }


def test_axes_are_labelled(drawn):
    for name, figure in drawn.items():
        *upper, last = figure.axes[:-1] if name == "learning_order" else figure.axes
        assert last.get_xlabel() or last.get_xticklabels(), name
        assert all(axes.get_ylabel() or name == "sweep_cost" for axes in [*upper, last]), name


def test_pages_get_vectors_in_the_page_s_own_colour(drawn):
    for name, figure in drawn.items():
        svg = figure_style.to_svg(figure, name)
        root = xml.fromstring(svg)
        assert root.get("aria-label") == name and "width" not in root.attrib
        assert "<image" not in svg and "#000000" not in svg and "#ffffff" not in svg, name


def test_same_numbers_same_bytes(sweep):
    first, second = (figure_style.to_svg(figures.loss_curves(collect.train(sweep)), "Loss") for _ in range(2))
    assert first == second


def test_legends_cover_no_data(drawn):
    for name, figure in drawn.items():
        with matplotlib.rc_context(figure_style.STYLE):
            figure.draw_without_rendering()
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes), name
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, name


def test_more_arms_than_colours_get_a_panel_each(sweep):
    copies = [f"arm_{i}" for i in range(9)]  # two columns of panels, one panel fewer in the right one
    measures = collect.measures(sweep / "stepwise-s0")
    figure = figures.frontier(pd.concat(measures.assign(arm=name) for name in copies))
    assert [axes.get_title(loc="left") for axes in figure.axes] == copies
    assert [axes.get_ylabel() == "" for axes in figure.axes] == [False, True] * 4 + [False]
    below = [axes for axes in figure.axes if axes.get_xlabel()]
    assert below == figure.axes[-2:]
    assert all(axes.xaxis.get_tick_params()["labelbottom"] for axes in below)
    assert all(len([line for line in axes.lines if line.get_alpha() == 0.2]) == 8 for axes in figure.axes)
    assert figure.get_size_inches()[1] < 10
    assert len(figures.loss_curves(collect.train(sweep)).axes) == 1  # two arms share one


def test_series_differ_without_colour():
    styles = figure_style.series_styles([str(i) for i in range(20)]).values()
    assert len({tuple(style.values()) for style in styles}) == 20
    first = list(styles)[:7]
    assert len({style["linestyle"] for style in first}) == len({style["marker"] for style in first}) == 7


def test_frontier_shows_the_tables_numbers(drawn, sweep):
    measures = collect.measures(sweep)
    lines = {line.get_label(): line for line in drawn["frontier"].axes[0].lines}
    for arm in ("all at once", "stepwise"):
        for name, shown in (("lab/kl", lines[arm].get_xdata()), ("lab/gold", lines[arm].get_ydata())):
            table = collect.by_arm(measures[measures["measure"] == name], ["t"]).query("arm == @arm")
            assert shown.tolist() == table["value"].tolist()


def test_best_of_n_stands_at_its_divergence(drawn):
    # KL of best of n: log n - (n - 1)/n, so 0 for one answer and log 4 - 3/4 for four
    best = next(line for line in drawn["frontier"].axes[0].lines if line.get_label().startswith("best of n"))
    assert best.get_xdata()[[0, 2]].tolist() == pytest.approx([0, 0.636294], abs=1e-6)
    assert best.get_ydata().tolist() == pytest.approx([0.69, 0.74, 0.79, 0.84, 0.89, 0.94, 0.99])


def test_loss_starts_anew_at_every_step(drawn):
    curves = [line for line in drawn["loss_curves"].axes[0].lines if line.get_linewidth() > 1]
    assert [list(curve.get_xdata()) for curve in curves[1:]] == [list(range(1, 13)), list(range(13, 25))]


def test_long_curves_are_binned(sweep):
    train = collect.train(sweep / "stepwise-s0")
    long = train.loc[train.index.repeat(100)].assign(overall_update=range(1, 2401), t=1)
    line = figures.loss_curves(long).axes[0].lines[1]
    assert len(line.get_xdata()) <= 2 * figures.MOST_POINTS
    assert line.get_ydata()[0] == pytest.approx(long["loss"][:9].mean())


def test_memorisation_separates_what_was_seen(drawn, sweep):
    trained, coming, held_out = drawn["memorisation"].axes[1].lines[:3]
    assert trained.get_xdata().tolist() == [1, 2]
    assert coming.get_xdata().tolist() == [0, 1]
    assert held_out.get_ydata().tolist() == pytest.approx([0, 1.5, 3])
    assert trained.get_ydata().tolist() == pytest.approx([5.5, 7])


def test_memorisation_of_rounds_whose_given_pairs_were_never_trained_on(sweep):
    trajectory = collect.trajectory(sweep)
    trained, coming, _ = figures.memorisation(trajectory.assign(seen=False)).axes[1].lines[:3]
    assert trained.get_xdata().tolist() == [] and coming.get_xdata().tolist() == [0, 1, 2]


def test_pairs_that_stand_in_two_chunks(sweep):
    trajectory, pairs = collect.trajectory(sweep / "stepwise-s0"), collect.pairs(sweep / "stepwise-s0")
    again = trajectory[trajectory["chunk"] == 1].assign(chunk=2)
    repeated = pd.concat([trajectory, again], ignore_index=True)
    rise = figures.memorisation(repeated).axes[0].lines[2].get_ydata().tolist()
    assert rise == pytest.approx([0, 1.5, 3])
    figures.learning_order(repeated, pairs)
    figures.trajectories(repeated)


def test_cost_counts_a_shared_step_once(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / f"s{seed}", seed=seed)
    steps, train = collect.steps(tmp_path), collect.train(tmp_path)
    alone, shared = figures.sweep_cost(steps.assign(key=["a", "b", "a", "c"]), train).axes[0].patches
    assert alone.get_width() == pytest.approx(4 * 12 * 0.1)
    assert shared.get_width() == pytest.approx(3 * 12 * 0.1)
