"""The report page of a run or a sweep: `python -m analysis.report RUN_OR_SWEEP [--figures FOLDER]`.

report.html is one file without scripts that needs no network. It shows what was run, the results, reasons to doubt
them, figures, choices and steps, and the command that repeats the run. Its numbers are those of analysis.tables.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure

from analysis import checks, collect, equal_kl, figures, table_format, tables
from analysis.figure_style import save, to_svg
from analysis.significance import LEFT_S
from sdpo.errors import UserError

AXES = ("model", "data", "arm", "split", "score", "reference", "loss", "tune")  # listed before other axes
MOST_PROMPTS = 20  # with their answers on the page
TEMPLATES = Path(__file__).parent / "templates"

FigureCall = tuple[str, Callable[..., Figure], tuple]  # title, figure function (its docstring: caption), arguments


def write_report(folder: Path | str) -> Path:
    """Write report.html into a run or sweep folder and return its path."""
    folder = Path(folder)
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("report.html.jinja").render(_content(folder))
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _content(folder: Path) -> dict:
    """The content of the template; if no run of a sweep finished, only its failures."""
    runs = collect.runs(folder)
    content = {"name": folder.resolve().name, "size": tables.size(runs), "choices": _choices(runs)}
    content["opening"] = f"{runs['done'].sum()} of {tables.count(len(runs), 'run')} finished{_shared(runs)}"
    if not runs["done"].any():
        return content | {"warnings": [checks.unfinished(runs)]}
    measures, steps, references = collect.measures(folder), collect.steps(folder), collect.references(folder)
    return content | {
        "warnings": checks.warnings(runs, measures, steps, references),
        "contrasts": tables.show(tables.contrasts(folder)),
        "equal_kl": tables.show(equal_kl.above_plain(folder)),
        "arms": tables.show(tables.arms(folder)),
        "medians": tables.show(tables.medians(folder)),
        "left_s": LEFT_S,
        "others": tables.show(tables.others(folder)),
        "steps": tables.show(tables.steps(folder)),
        "pictures": [
            {"title": title, "svg": to_svg(draw(*tables_read), title), "caption": draw.__doc__}
            for title, draw, tables_read in _figure_calls(folder, measures, steps, references)
        ],
        "answers": list(_answers(collect.answers(folder))),
        "lineage": _lineage(steps),
        "data": _data(runs),
        "origin": _origin(folder, runs),
    }


def write_figures(folder: Path | str, into: Path) -> list[Path]:
    """Write every figure of the report into a folder as .svg and .pdf, named after its function. Returns the paths."""
    into.mkdir(parents=True, exist_ok=True)
    folder, written = Path(folder), []
    tables_read = (read(folder) for read in (collect.measures, collect.steps, collect.references))
    for _, draw, arguments in _figure_calls(folder, *tables_read):
        figure = draw(*arguments)
        for ending in ("svg", "pdf"):
            written.append(into / f"{draw.__name__}.{ending}")
            save(figure, written[-1])
    return written


def _figure_calls(
    folder: Path, measures: pd.DataFrame, steps: pd.DataFrame, references: pd.DataFrame
) -> Iterator[FigureCall]:
    """The figures for which these runs have numbers."""
    train, trajectory = collect.train(folder), collect.trajectory(folder)
    measured = set(measures.loc[measures["value"].notna(), "measure"])
    yield "Loss", figures.loss_curves, (train,)
    if {"lab/gold", "lab/kl"} <= measured:
        yield "Reward against KL", figures.frontier, (measures,)
    if steps["gamma_ref_mean"].notna().any():
        yield "The bound of every step", figures.reference_gammas, (steps, references)
    if "preference/ranking_accuracy" in measured:
        yield "Accuracy by source", figures.accuracy_by_source, (measures,)
        yield "Displacement", figures.displacement, (measures,)
    yield "Memorisation", figures.memorisation, (trajectory,)
    if steps["run"].nunique() == 1:
        yield "Trajectories", figures.trajectories, (trajectory,)
        yield "Learning order", figures.learning_order, (trajectory, collect.pairs(folder))
    else:
        yield "Cost", figures.sweep_cost, (steps, train)


def _choices(runs: pd.DataFrame) -> pd.DataFrame:
    """The option chosen on every axis; if arms chose different options, each with its arms."""
    axes = runs.filter(like="choices.").rename(columns=lambda name: name.removeprefix("choices."))
    rows = {}
    for axis in sorted(axes, key=lambda axis: AXES.index(axis) if axis in AXES else len(AXES)):
        by_arm = axes[axis].fillna("none").groupby(runs["arm"], sort=False).first()
        arms = {option: ", ".join(group.index) for option, group in by_arm.groupby(by_arm, sort=False)}
        plain = len(arms) == 1 or axis == "arm"
        rows[axis] = "; ".join(arms) if plain else "; ".join(f"{option} ({names})" for option, names in arms.items())
    return pd.DataFrame(rows.items(), columns=["axis", "option"])


def _shared(runs: pd.DataFrame) -> str:
    """The choices that all arms share, as on the command line."""
    options = {axis: runs[name].dropna().unique() for axis in AXES if (name := f"choices.{axis}") in runs}
    same = [f"{axis}={found[0]}" for axis, found in options.items() if len(found) == 1]
    return f", all with {', '.join(same)}" if same else ""


def _answers(answers: pd.DataFrame) -> Iterator[tuple[str, dict[str, str]]]:
    """The first prompts with the answers of S and of every M_t; if there are several arms, with the answers of S and of
    the last model of each arm's first seed."""
    first = answers[answers["seed"] == answers.groupby("arm")["seed"].transform("min")]
    single = first["arm"].nunique() == 1
    if not single:
        first = first[(first["t"] == 0) | (first["t"] == first.groupby("run")["t"].transform("max"))]
    names = ("M_" + first["t"].astype(str)) if single else first["arm"]
    named = first.assign(by=names.mask(first["t"] == 0, "S")).drop_duplicates(["id", "turn", "by"])
    for _, rows in list(named.groupby(["id", "turn"], sort=False))[:MOST_PROMPTS]:
        yield rows["prompt"].iloc[0], dict(zip(rows["by"], rows["answer"], strict=True))


def _lineage(steps: pd.DataFrame) -> pd.DataFrame:
    """The start, reference and pairs of each model, for the first seed of every arm."""
    first = steps[steps["seed"] == steps.groupby("arm")["seed"].transform("min")]
    chunks = [", ".join(f"{n} {source}" for source, n in sources.items()) for sources in first["sources"]]
    made = first.assign(model="M_" + first["t"].astype(str), pairs=chunks, key=first["key"].str[:16])
    made["reused"] = first["reused"].map({True: "yes", False: "no"})
    shown = made[["arm", "model", "start", "reference", "pairs", "key", "reused"]]
    return shown.rename(columns={"start": "from", "key": "key in the store"})


def _data(runs: pd.DataFrame) -> pd.DataFrame:
    """data_report.json of the first finished run as a flat table; a long list is replaced by its length."""
    report = json.loads((runs[runs["done"]].iloc[0]["folder"] / "data_report.json").read_text(encoding="utf-8"))
    flat = pd.json_normalize(report, sep=" / ").to_dict("records")[0]

    def said(value: object) -> str:
        if isinstance(value, list) and len(value) > 3:
            return f"{len(value)} entries in data_report.json"
        return table_format.number(value) if isinstance(value, float) else str(value)

    return pd.DataFrame([(name, said(value)) for name, value in flat.items()], columns=["name", "value"])


def _origin(folder: Path, runs: pd.DataFrame) -> dict:
    """The command that started the run or sweep, and its code, versions and machine."""
    manifest = json.loads((runs[runs["done"]].iloc[0]["folder"] / "manifest.json").read_text(encoding="utf-8"))
    sweep = folder / "sweep.json"
    command = json.loads(sweep.read_text(encoding="utf-8"))["command"] if sweep.is_file() else manifest["command"]
    git, versions = manifest["git"], {name: version for name, version in manifest["versions"].items() if version}
    return {
        "command": shlex.join(["python", Path(command[0]).name, *command[1:]]),
        "commit": f"{git['commit']}{' with local changes' if git['dirty'] else ''}" if git["commit"] else "unknown",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "machine": ", ".join(f"{name} {part}" for name, part in manifest["machine"].items() if part),
        "spent": _spent(runs[runs["done"]]["folder"]),
    }


def _spent(folders: Iterable[Path]) -> str:
    """Where the seconds of a run went, as means over runs; empty for runs of versions that did not count them."""
    summaries = [json.loads((folder / "summary.json").read_text(encoding="utf-8")) for folder in folders]
    parts = pd.DataFrame([summary["spent"] for summary in summaries if "spent" in summary]).mean()
    return ", ".join(f"{part} {seconds:.1f} s" for part, seconds in parts.items())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis.report", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a run or sweep folder")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="also write the figures there, as .svg and .pdf")
    chosen = parser.parse_args()
    try:
        print(write_report(chosen.folder))
        if chosen.figures:
            print(*write_figures(chosen.folder, chosen.figures), sep="\n")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
