"""How figures look, on paper and on a page: one column wide, vector, for the colour-blind, readable in grey.

Series differ in colour (Okabe-Ito), line style and marker at once. On a page black becomes the page's text colour,
so that one picture serves light and dark.
"""

import re
from collections.abc import Callable
from io import StringIO
from itertools import islice, product
from math import ceil
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 4.6  # inches
MOST_ROWS = 6  # panels under each other; more stand in two columns
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (9, 2)), (0, (3, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.2,
    "grid.color": "#000000",
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
}


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """A figure function whose figures have this style, and nobody else's change."""
    return matplotlib.rc_context(STYLE)(draw)


def panels(num: int = 1, height: float = 2.6, **sharing) -> tuple[Figure, list[Axes]]:
    """Panels under each other, each `height` inches high; more than MOST_ROWS stand in two columns and are lower."""
    columns = 1 if num <= MOST_ROWS else 2
    num_rows, height = ceil(num / columns), height if columns == 1 else 1.5
    figure = Figure(figsize=(WIDTH, height * num_rows + 0.6), layout="constrained")
    grid = figure.subplots(num_rows, columns, squeeze=False, **sharing).flatten()
    for unused in grid[num:]:
        unused.remove()
    return figure, list(grid[:num])


def label_outer(rows: list[Axes], xlabel: str) -> None:
    """The x label and ticks below each column of panels, the y label left of the first alone."""
    columns = rows[0].get_gridspec().ncols
    for axes in rows[-columns:]:
        axes.set_xlabel(xlabel)
        axes.tick_params(labelbottom=True)
    for axes in rows:
        if not axes.get_subplotspec().is_first_col():
            axes.set_ylabel("")


def by_panel(names: list[str]) -> dict[str, list[str]]:
    """Title -> the names of a panel: one panel, without title, while there is a colour for each; else one each."""
    return {"": names} if len(names) <= len(COLOURS) else {name: [name] for name in names}


def looks(names: list[str]) -> dict[str, dict]:
    """A colour, line style and marker for every name; after seven, colours meet other line styles."""
    shifted = product(range(len(COLOURS)), range(len(COLOURS)))
    return {
        name: {"color": COLOURS[i], "linestyle": LINES[(i + shift) % 7], "marker": MARKERS[(i + shift) % 7]}
        for name, (shift, i) in zip(names, islice(shifted, len(names)), strict=True)
    }


def legend(figure: Figure, axes: Axes) -> None:
    """The series of `axes` below the panels, where no data is covered, in as many columns as fit."""
    handles, names = axes.get_legend_handles_labels()
    columns = min(len(names), max(1, int(WIDTH * 12 / (max(map(len, names)) + 9))))
    figure.set_figheight(figure.get_figheight() + 0.18 * ceil(len(names) / columns))
    figure.legend(handles, names, loc="outside lower center", ncols=columns)


def save(figure: Figure, path: Path | str) -> None:
    """Write a figure to a file, by its ending .svg, .pdf or .png, on white."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, facecolor="white", dpi=200)


def show(figure: Figure):
    """A figure in a notebook, sharp at any size."""
    from IPython.display import HTML

    return HTML(f'<div style="max-width: 34em">{to_svg(figure, "figure")}</div>')


def to_svg(figure: Figure, title: str) -> str:
    """A figure as an SVG element for a page: no fixed size, a name to be read aloud, black as the text's colour."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": title}):
        file = StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("#000000", "currentColor").replace("xlink:href", "href")
    width, height = (72 * inches for inches in figure.get_size_inches())
    head = f'<svg viewBox="0 0 {width:.0f} {height:.0f}" fill="currentColor" role="img" aria-label="{title}">'
    return re.sub(r"<svg [^>]*>", head, svg, count=1)
