"""What a sweep prints: a line for each failure while it goes on, and a table of all arms at its end."""

import json
import sys
from pathlib import Path

from tqdm import tqdm

from sdpo.console import columns, number
from sdpo.errors import UserError
from sdpo.run import folder as run_folder
from sdpo.run.folder import Run
from sdpo.stats import as_measure, student


def note_end(run: Run, bar: tqdm, error: str | None) -> None:
    """Count a run that ended. `error` is the cause of a failure that the run could not write down itself."""
    if error and not run.error:
        run_folder.fail(run.folder, UserError(error))
    if run.error:
        tqdm.write(f"failed: {run.folder.name}: {run.error}", file=sys.stderr)
    bar.update()


def summary_table(runs: list[Run], todo: set[Path]) -> str:
    """The table, then the failures. `todo` are the folders of the runs that were not finished when the sweep began."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    ended = [run for run in runs if run.folder not in todo or run.finished]
    summaries = {run.folder: _summary(run, run.folder in todo) for run in ended}
    rows = [_row(arm, members, summaries) for arm, members in arms.items()]
    lines = columns([("arm", "seeds", "headline", "seconds, sum", "steps trained", "reused"), *rows])
    lines += [f"failed: {run.folder.name}: {run.error}" for run in runs if run.error]
    trained, reused = (sum(s[key] for s in summaries.values()) for key in ("trained_steps", "reused_steps"))
    lines.append(f"{len(summaries)} of {len(runs)} runs finished; {trained} steps trained, {reused} reused")
    return "\n".join(lines)


def _summary(run: Run, was_todo: bool) -> dict:
    """The summary of a finished run. If the sweep found the run finished, all its steps count as reused."""
    summary = json.loads((run.folder / "summary.json").read_text())
    if not was_todo:
        summary["reused_steps"] += summary["trained_steps"]
        summary["trained_steps"] = 0
    return summary


def _row(arm: str, members: list[Run], summaries: dict[Path, dict]) -> tuple[str, ...]:
    mine = [summaries[run.folder] for run in members if run.folder in summaries]
    total = [sum(summary[key] for summary in mine) for key in ("seconds", "trained_steps", "reused_steps")]
    return arm, f"{len(mine)}/{len(members)}", _headline(mine), *(f"{value:.0f}" for value in total)


def _headline(summaries: list[dict]) -> str:
    """The name of the headline, its mean over the seeds, and the 95 % interval."""
    headlines = [summary["headline"] for summary in summaries if summary["headline"]["value"] is not None]
    if not headlines:
        return "-"
    mean = as_measure(student([headline["value"] for headline in headlines]))
    return f"{headlines[0]['name']} {number(mean['value'], mean['low'], mean['high'])}"
