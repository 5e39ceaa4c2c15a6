"""The style of the figures: one column wide, vector graphics, readable for the colour-blind and in grey.

Series differ in colour (Okabe-Ito palette), line style and marker. On a page black becomes the text colour of the page,
so that one picture suits light and dark themes.
"""

import re
from collections.abc import Callable
from functools import wraps
from html import escape
from io import StringIO
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 4.6  # inches
MOST_ROWS = 6  # of panels in one column; more panels are set in two columns
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (9, 2)), (0, (3, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

STYLE: dict[Any, Any] = {  # Any: matplotlib types the keys as a union of all their names
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
    """Decorates a figure function: its figures get this style, and its docstring as their label, which is not drawn."""

    @wraps(draw)
    def drawn(*arguments: Any, **settings: Any) -> Figure:
        with matplotlib.rc_context(STYLE):
            figure = draw(*arguments, **settings)
        figure.set_label(" ".join((draw.__doc__ or "").split()))
        return figure

    return drawn


def panels(num: int = 1, height: float = 2.6, **sharing) -> tuple[Figure, list[Axes]]:
    """A figure with `num` panels, each `height` inches high, in one column; or lower ones in two if there are many."""
    columns = _num_columns(num)
    num_rows, height = ceil(num / columns), height if columns == 1 else 1.5
    figure = Figure(figsize=(WIDTH, height * num_rows + 0.6), layout="constrained")
    grid = figure.subplots(num_rows, columns, squeeze=False, **sharing).flatten()
    for unused in grid[num:]:
        unused.remove()
    return figure, list(grid[:num])


def label_outer(rows: list[Axes], xlabel: str) -> None:
    """Set the x label and ticks below the last panel of each column; remove y labels outside the first column."""
    columns = _num_columns(len(rows))
    for axes in rows[-columns:]:
        axes.set_xlabel(xlabel)
        axes.tick_params(labelbottom=True)
    for i, axes in enumerate(rows):
        if i % columns:
            axes.set_ylabel("")


def _num_columns(num_panels: int) -> int:
    return 1 if num_panels <= MOST_ROWS else 2


def by_panel(names: list[str]) -> dict[str, list[str]]:
    """Title -> names of a panel: one panel without title if there is a colour for each name, else one panel each."""
    return {"": names} if len(names) <= len(COLOURS) else {name: [name] for name in names}


def series_styles(names: list[str]) -> dict[str, dict]:
    """A colour, line style and marker for every name; after seven names colours get other line styles and markers."""
    return {
        name: {"color": COLOURS[i % 7], "linestyle": LINES[(i + i // 7) % 7], "marker": MARKERS[(i + i // 7) % 7]}
        for i, name in enumerate(names)
    }


def legend(figure: Figure, axes: Axes) -> None:
    """Add a legend with the series of `axes` below the panels, in as many columns as fit."""
    handles, names = axes.get_legend_handles_labels()
    columns = min(len(names), max(1, int(WIDTH * 12 / (max(map(len, names)) + 9))))
    figure.set_figheight(figure.get_figheight() + 0.18 * ceil(len(names) / columns))
    figure.legend(handles, names, loc="outside lower center", ncols=columns)


def save(figure: Figure, path: Path | str) -> None:
    """Write a figure on white to a .svg, .pdf or .png file."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, facecolor="white", dpi=200)


def show(figure: Figure) -> Any:
    """The figure as HTML for a notebook, sharp at any size, with what its function's docstring says under it."""
    from IPython.display import HTML

    drawing, caption = to_svg(figure, "figure"), escape(str(figure.get_label()))
    return HTML(f'<div style="max-width: 34em">{drawing}<p>{caption}</p></div>')


def to_svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element for a page: no fixed size, `title` for screen readers, black as the text colour."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": title}):
        file = StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("#000000", "currentColor").replace("xlink:href", "href")
    width, height = (72 * inches for inches in figure.get_size_inches())
    head = f'<svg viewBox="0 0 {width:.0f} {height:.0f}" fill="currentColor" role="img" aria-label="{title}">'
    return re.sub(r"<svg [^>]*>", head, svg, count=1)
