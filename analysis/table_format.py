"""Tables of results as text, Markdown or LaTeX, and the format of their numbers."""

import re
from math import isnan, nan

import pandas as pd

from sdpo.stats import Interval

FORMATS = ("text", "markdown", "latex")
LITERAL = {character: f"\\{character}" for character in "&%$#_{}"} | {"±": r"$\pm$", "<": "$<$", ">": "$>$"}
LITERAL |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def number(value: float | Interval, digits: int = 3) -> str:
    """A number or an interval as the cell of a table, with `digits` decimals; empty if it is nan.

    `0.852`; `< 0.001` for a positive number that would be rounded to 0; `0.852 ± 0.011` for an interval, or
    `0.852 [0.800, 0.865]` if its sides differ.
    """
    mean, low, high, _ = value if isinstance(value, Interval) else Interval(value, nan, nan, 1)
    if isnan(mean):
        return ""
    text = f"{mean:,.{digits}f}"
    if isnan(low):
        return f"< {10**-digits:.{digits}f}" if 0 < mean < 10**-digits / 2 else text
    above, below = (f"{distance:.{digits}f}" for distance in (high - mean, mean - low))
    return f"{text} ± {above}" if above == below else f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def render(table: pd.DataFrame, title: str, notes: list[str], form: str) -> str:
    """A table of strings with its title above and its notes below, in one of FORMATS."""
    rows = [list(table), *table.to_numpy().tolist()]
    return {"text": _text, "markdown": _markdown, "latex": _latex}[form](rows, title, notes)


def document(tables: list[str], form: str) -> str:
    """Several rendered tables as one output; in LaTeX a file to \\input, which says what it needs."""
    needs = ["% needs \\usepackage[T1]{fontenc}, \\usepackage{booktabs} and \\usepackage{graphicx}"]
    return "\n\n".join(needs * (form == "latex") + tables)


def _are_words(rows: list[list[str]]) -> list[bool]:
    """Whether each column holds words, which stand on the left, and not numbers. The first row is the head."""
    columns = zip(*rows[1:], strict=True)
    return [any(cell and not re.match(r"[<\s-]*\d", cell) for cell in column) for column in columns]


def _text(rows: list[list[str]], title: str, notes: list[str]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    formats = [f"{'<' if words else '>'}{width}" for words, width in zip(_are_words(rows), widths, strict=True)]
    lines = ["  ".join(map(format, row, formats)) for row in rows]
    rule = "-" * len(lines[0])
    return "\n".join([title, rule, lines[0], rule, *lines[1:], rule, *(f"* {note}" for note in notes)])


def _markdown(rows: list[list[str]], title: str, notes: list[str]) -> str:
    rule = ["---" if words else "---:" for words in _are_words(rows)]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (rows[0], rule, *rows[1:])]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([f"**{title}**", "", *lines, *(["", *(f"- {note}" for note in notes)] if notes else [])])


def _latex(rows: list[list[str]], title: str, notes: list[str]) -> str:
    head, *lines = [" & ".join(map(_tex, row)) + r" \\" for row in rows]
    begin = rf"\begin{{tabular}}{{{''.join('l' if words else 'r' for words in _are_words(rows))}}}"
    tabular = [begin, r"\toprule", head, r"\midrule", *lines, r"\bottomrule", r"\end{tabular}"]
    fitted = [r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%", *tabular, "}"]
    below = [rf"\par\smallskip\raggedright\footnotesize {_tex(note)}" for note in notes]
    named = [rf"\caption{{{_tex(title)}}}", rf"\label{{tab:{_label(title)}}}"]
    return "\n".join([r"\begin{table}", r"\centering", *named, *fitted, *below, r"\end{table}"])


def _label(title: str) -> str:
    """A name for \\ref: the title's first words, as far as its first mark, without capitals."""
    return "-".join(re.findall(r"[a-z0-9]+", re.split("[:,(]", title)[0].lower()))


def _tex(text: str) -> str:
    """Text with LaTeX's special characters escaped, and models (M_1), minus signs and ± as mathematics."""
    escaped = "".join(LITERAL.get(character, character) for character in text)
    models = re.sub(r"\bM\\_(\d+|t)\b", r"$M_{\1}$", escaped)
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", models)
