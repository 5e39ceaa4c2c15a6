"""How a table of numbers is set as text, Markdown or LaTeX (a document that compiles as it stands)."""

import re

import pandas as pd

FORMATS = ("text", "markdown", "latex")
LITERAL = {character: f"\\{character}" for character in "&%$#_{}"} | {"±": r"$\pm$", "<": "$<$", ">": "$>$"}
LITERAL |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def number(value: float | None, low: float | None = None, high: float | None = None, digits: int = 3) -> str:
    """`0.852`, `< 0.001` if not 0, `0.852 ± 0.011`, `0.852 [0.800, 0.865]` where lopsided; empty if undefined."""
    if value is None or pd.isna(value):
        return ""
    said = f"{value:,.{digits}f}"
    if low is None or pd.isna(low):
        return f"< {10**-digits:.{digits}f}" if 0 < value < 10**-digits / 2 else said
    above, below = (f"{distance:.{digits}f}" for distance in (high - value, value - low))
    return f"{said} ± {above}" if above == below else f"{said} [{low:.{digits}f}, {high:.{digits}f}]"


def setting(table: pd.DataFrame, title: str, notes: list[str], form: str) -> str:
    """A table of strings with its title above and its notes below, in one of FORMATS."""
    return {"text": _text, "markdown": _markdown, "latex": _latex}[form](table, title, notes)


def document(settings: list[str], form: str) -> str:
    """Several set tables as one output."""
    body = "\n\n".join(settings)
    if form != "latex":
        return body
    packages = "\n".join(rf"\usepackage{package}" for package in ("[T1]{fontenc}", "{booktabs}", "{graphicx}"))
    return f"\\documentclass{{article}}\n{packages}\n\\begin{{document}}\n{body}\n\\end{{document}}"


def _text(table: pd.DataFrame, title: str, notes: list[str]) -> str:
    rows = [list(table), *table.to_numpy().tolist()]
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]) for row in rows]
    rule = "-" * len(lines[0])
    return "\n".join([title, rule, lines[0], rule, *lines[1:], rule, *(f"* {note}" for note in notes)])


def _markdown(table: pd.DataFrame, title: str, notes: list[str]) -> str:
    heads = list(table)
    rows = [heads, ["---"] + ["---:"] * (len(heads) - 1), *table.to_numpy().tolist()]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([f"**{title}**", "", *lines, *(["", *(f"- {note}" for note in notes)] if notes else [])])


def _latex(table: pd.DataFrame, title: str, notes: list[str]) -> str:
    head, *rows = [list(table), *table.to_numpy().tolist()]
    lines = [" & ".join(map(_tex, row)) + r" \\" for row in rows]
    tabular = [
        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"\toprule",
        " & ".join(map(_tex, head)) + r" \\",
        r"\midrule",
        *lines,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    fitted = [r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%", *tabular, "}"]
    below = [rf"\par\smallskip\raggedright\footnotesize {_tex(note)}" for note in notes]
    return "\n".join([r"\begin{table}", r"\centering", rf"\caption{{{_tex(title)}}}", *fitted, *below, r"\end{table}"])


def _tex(text: str) -> str:
    """Text with LaTeX's special characters made literal, and minus signs and the like as mathematics."""
    escaped = "".join(LITERAL.get(character, character) for character in text)
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", escaped)
