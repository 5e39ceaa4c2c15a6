"""The table at the end of a sweep: every arm over its seeds, what was trained for it, and every failure."""

import json
from pathlib import Path

from sdpo.console import columns
from sdpo.run.folder import Run
from sdpo.stats import student


def of(runs: list[Run], now: set[Path]) -> str:
    """The table as text. `now` are the folders of the runs that were not finished when the sweep began."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    ended = [run for run in runs if run.folder not in now or run.finished]
    summaries = {run.folder: _summary(run, run.folder in now) for run in ended}
    rows = [_row(arm, members, summaries) for arm, members in arms.items()]
    lines = columns([("arm", "seeds", "headline", "seconds", "steps trained", "reused"), *rows])
    lines += [f"failed: {run.folder.name}: {run.error}" for run in runs if run.error]
    trained, reused = (sum(s[key] for s in summaries.values()) for key in ("trained_steps", "reused_steps"))
    lines.append(f"{len(summaries)} of {len(runs)} runs finished; {trained} steps trained, {reused} reused")
    return "\n".join(lines)


def _summary(run: Run, now: bool) -> dict:
    """What a finished run says of itself; the steps of one that was finished before are all reused ones."""
    summary = json.loads((run.folder / "summary.json").read_text())
    if not now:
        summary["reused_steps"] += summary["trained_steps"]
        summary["trained_steps"] = 0
    return summary


def _row(arm: str, members: list[Run], summaries: dict[Path, dict]) -> tuple[str, ...]:
    mine = [summaries[run.folder] for run in members if run.folder in summaries]
    total = [sum(summary[key] for summary in mine) for key in ("seconds", "trained_steps", "reused_steps")]
    return arm, f"{len(mine)}/{len(members)}", _headline(mine), *(f"{value:.0f}" for value in total)


def _headline(summaries: list[dict]) -> str:
    """Mean and 95 % interval over the seeds."""
    headlines = [summary["headline"] for summary in summaries if summary["headline"]["value"] is not None]
    if not headlines:
        return "-"
    mean = student([headline["value"] for headline in headlines])
    interval = f" [{mean.low:.4f}, {mean.high:.4f}]" if mean.n > 1 else ""
    return f"{headlines[0]['name']} {mean.value:.4f}{interval}"
