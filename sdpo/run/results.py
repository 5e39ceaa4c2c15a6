"""The run folder at the end of a run: lineage, split, trajectories, pairs and summary, from what was gathered."""

import json
import os
from pathlib import Path

import pandas as pd

from sdpo.curriculum import build
from sdpo.data.preferences import Pair
from sdpo.evals.evaluator import Evidence
from sdpo.evals.generation import write_formats
from sdpo.launch import local as launch
from sdpo.metrics import write_json
from sdpo.run import trajectory
from sdpo.run.provenance import environment
from sdpo.train.setup import Inputs
from sdpo.variants.split import Chunks

HEADLINES = ("lab/gold", "preference/reward_accuracy_initial")


def write(folder: Path, inputs: Inputs, evidence: Evidence, chunks: Chunks, seconds: float) -> dict:
    """Write everything but metrics.jsonl, and return what summary.json holds."""
    followed = trajectory.table(inputs, evidence, chunks)
    summary = _summary(evidence, seconds)
    history = [measured.model for measured in evidence.measured]
    split, scores = build.describe(inputs, evidence.config, history, chunks)
    if not launch.is_main():
        return summary
    write_json(folder / "data_report.json", inputs.report)
    write_json(folder / "split.json", split)
    followed.to_parquet(folder / "trajectory.parquet", index=False)
    _pairs(inputs, chunks, scores).to_parquet(folder / "pairs.parquet", index=False)
    begun = json.loads((folder / "manifest.json").read_text())
    manifest = begun | _lineage(inputs, evidence) | environment()
    write_json(folder / "manifest.json", manifest)
    _link_steps(folder / "steps", evidence)
    _write_answers(folder / "answers", evidence)
    write_json(folder / "summary.json", summary)
    evidence.recorder.conclude(manifest, summary)
    return summary


def _summary(evidence: Evidence, seconds: float) -> dict:
    initial, *steps = evidence.measured
    reused = sum(step.model.reused for step in steps)
    name = next((name for name in HEADLINES if name in steps[-1].eval), None)
    last = steps[-1].eval[name] if name else {"value": None, "n": 0}
    return {
        "steps": [step.summary | {"eval": step.eval} for step in steps],
        "initial": {"eval": initial.eval},
        "headline": {"name": name, "value": last["value"], "n": last["n"]},
        "seconds": seconds,
        "trained_steps": len(steps) - reused,
        "reused_steps": reused,
    }


def _lineage(inputs: Inputs, evidence: Evidence) -> dict:
    """Every step with its chunk, start, reference and result, by key."""
    steps = []
    for t, (model, step, _, _, summary) in enumerate(evidence.measured):
        if step:
            lineage = {"t": t, "key": model.key, "start": step.start.key, "windows": step.windows}
            names = ("num_pairs", "sources", "gamma_ref_mean", "reused")
            steps.append(lineage | {name: summary[name] for name in names})
    return {"model_key": inputs.initial.key, "steps": steps}


def _pairs(inputs: Inputs, chunks: Chunks, scores: dict[str, float]) -> pd.DataFrame:
    """One row per pair that a run trained on or held out: where it went, and its sizes."""
    chunk_of = {id: t for t, ids in enumerate(chunks, start=1) for id in ids}

    def record(row, held_out: bool) -> dict:
        pair: Pair = inputs.pairs[row.id]
        return {
            "id": row.id,
            "source": pair.source,
            "held_out": held_out,
            "chunk": 0 if held_out else chunk_of[row.id],
            "score": scores.get(row.id, float("nan")),
            "prompt_tokens": len(row.prompt),
            "chosen_tokens": len(row.chosen),
            "rejected_tokens": len(row.rejected),
            "chosen_rating": pair.chosen_rating,
            "rejected_rating": pair.rejected_rating,
        }

    used = [row for row in inputs.train if row.id in chunk_of]
    return pd.DataFrame([record(row, False) for row in used] + [record(row, True) for row in inputs.held_out])


def _link_steps(folder: Path, evidence: Evidence) -> None:
    """steps/t points to M_t in the store."""
    folder.mkdir(exist_ok=True)
    for t, measured in enumerate(evidence.measured[1:], start=1):
        link = folder / str(t)
        link.unlink(missing_ok=True)
        os.symlink(measured.model.folder, link)


def _write_answers(folder: Path, evidence: Evidence) -> None:
    """answers/RUN-M_t.*, where a suite gave any: the formats of AlpacaEval 2 and MT-Bench, and decoding.json."""
    for t, measured in enumerate(evidence.measured):
        for said in measured.told:
            write_formats(folder, f"{folder.parent.name}-M_{t}", said["answers"])
            write_json(folder / "decoding.json", said["decoding"])
