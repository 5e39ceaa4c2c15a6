"""How a table of numbers is set as text, Markdown or LaTeX (a document that compiles as it stands)."""

import re

import pandas as pd

FORMATS = ("text", "markdown", "latex")


def number(value: float | None, low: float | None = None, high: float | None = None, digits: int = 3) -> str:
    """`0.852`, `0.852 ± 0.011`, or `0.852 [0.800, 0.865]` where lopsided; empty if undefined."""
    if value is None or pd.isna(value):
        return ""
    said = f"{value:,.{digits}f}"
    if low is None or pd.isna(low):
        return said
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


def _flat(table: pd.DataFrame) -> list[str]:
    return [" ".join(part for part in column if part) if isinstance(column, tuple) else column for column in table]


def _text(table: pd.DataFrame, title: str, notes: list[str]) -> str:
    columns = [
        [head, *cells] for head, cells in zip(_flat(table), table.astype(str).T.to_numpy().tolist(), strict=True)
    ]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in zip(*columns, strict=True)
    ]
    rule = "-" * len(lines[0])
    return "\n".join([title, rule, lines[0], rule, *lines[1:], rule, *(f"* {note}" for note in notes)])


def _markdown(table: pd.DataFrame, title: str, notes: list[str]) -> str:
    heads = _flat(table)
    rows = [heads, ["---"] + ["---:"] * (len(heads) - 1), *table.astype(str).to_numpy().tolist()]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([f"**{title}**", "", *lines, *(["", *(f"- {note}" for note in notes)] if notes else [])])


def _latex(table: pd.DataFrame, title: str, notes: list[str]) -> str:
    head, *rows = [_flat(table), *table.astype(str).to_numpy().tolist()]
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


def _text(table: pd.DataFrame, title: str, notes: list[str]) -> str:
    columns = [
        [head, *cells] for head, cells in zip(_flat(table), table.astype(str).T.to_numpy().tolist(), strict=True)
    ]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in zip(*columns, strict=True)
    ]
    rule = "-" * len(lines[0])
    return "\n".join([title, rule, lines[0], rule, *lines[1:], rule, *(f"* {note}" for note in notes)])


def _markdown(table: pd.DataFrame, title: str, notes: list[str]) -> str:
    heads = _flat(table)
    rows = [heads, ["---"] + ["---:"] * (len(heads) - 1), *table.astype(str).to_numpy().tolist()]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([f"**{title}**", "", *lines, *(["", *(f"- {note}" for note in notes)] if notes else [])])


def _latex(table: pd.DataFrame, title: str, notes: list[str]) -> str:
    head, *rows = [_flat(table), *table.astype(str).to_numpy().tolist()]
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
    below = [rf"\par\smallskip\footnotesize {_tex(note)}" for note in notes]
    caption = rf"\caption{{{_tex(title)}}}"
    return "\n".join([r"\begin{table}", r"\centering", caption, *fitted, *below, r"\end{table}"])


def _tex(text: str) -> str:
    """Text with LaTeX's special characters made literal and minus signs and ± as mathematics."""
    escaped = re.sub(r"[\\~^]", lambda found: rf"\char`\{found[0]}{{}}", text)
    escaped = re.sub(r"([&%$#_])", r"\\\1", escaped)
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", escaped).replace("±", r"$\pm$").replace("<", "$<$").replace(">", "$>$")
