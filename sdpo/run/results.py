"""What a run writes when its last step is done: lineage, split, trajectories, pairs, answers and summary."""

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd

from sdpo import distributed
from sdpo.curriculum.build import Curriculum
from sdpo.data.pair_table import PairTable
from sdpo.evals.answer_formats import write_formats
from sdpo.evals.evaluator import Evaluator
from sdpo.metrics import CLOCK
from sdpo.run import trajectory
from sdpo.run.folder import write_json
from sdpo.run.provenance import environment

HEADLINES = ("lab/gold", "preference/reward_accuracy_initial")


def write(folder: Path, curriculum: Curriculum, evaluator: Evaluator, seconds: float) -> dict[str, Any]:
    """Write every result except metrics.jsonl, which is complete by now. Returns the content of summary.json."""
    inputs, chunks = curriculum.inputs, curriculum.chunks
    trajectories = trajectory.table(inputs, evaluator, chunks)
    summary, split = _summary(evaluator, seconds), curriculum.describe()
    if not distributed.is_main():
        return summary
    write_json(folder / "data_report.json", inputs.report)
    write_json(folder / "split.json", split)
    trajectories.to_parquet(folder / "trajectory.parquet", index=False)
    _pairs(curriculum).to_parquet(folder / "pairs.parquet", index=False)
    names = json.loads((folder / "manifest.json").read_text())
    manifest = names | _lineage(evaluator) | environment()
    write_json(folder / "manifest.json", manifest)
    _link_steps(folder, evaluator)
    _write_answers(folder / "answers", evaluator)
    write_json(folder / "summary.json", summary)
    if evaluator.recorder:
        evaluator.recorder.conclude(manifest, summary)
    return summary


def _summary(evaluator: Evaluator, seconds: float) -> dict[str, Any]:
    initial, *steps = evaluator.measured
    reused = sum(step.model.reused for step in steps)
    name = next((name for name in HEADLINES if name in steps[-1].eval), None)
    last = steps[-1].eval[name] if name else {"value": None, "n": 0}
    return {
        "steps": [step.summary | {"eval": step.eval} for step in steps],
        "initial": {"eval": initial.eval},
        "headline": {"name": name, "value": last["value"], "n": last["n"]},
        "seconds": seconds,
        "spent": CLOCK.seconds | {"other": seconds - sum(CLOCK.seconds.values())},
        "trained_steps": len(steps) - reused,
        "reused_steps": reused,
    }


def _lineage(evaluator: Evaluator) -> dict[str, Any]:
    """The key of S, and for every step the key of M_t, its start, its windows and its pairs."""
    initial, *rest = evaluator.measured
    names = ("num_pairs", "sources", "gamma_ref_mean", "reused")
    steps = []
    for t, (model, step, _, _, _, summary) in enumerate(rest, start=1):
        assert step  # only S has none
        lineage = {"t": t, "key": model.key, "start": step.spec.start.key, "windows": step.windows}
        steps.append(lineage | {name: summary[name] for name in names})
    return {"model_key": initial.model.key, "steps": steps}


def _pairs(curriculum: Curriculum) -> pd.DataFrame:
    """One row per training or held-out pair: its chunk (0: held out), score, token counts and ratings."""
    table, held_out = curriculum.inputs.train, curriculum.inputs.held_out
    chunk_of = {i: t for t, indices in enumerate(curriculum.chunks, start=1) for i in indices.tolist()}
    used = sorted(chunk_of)
    scores = float("nan") if curriculum.score_N is None else curriculum.score_N[used]
    trained = _frame(table.take(used)).assign(held_out=False, chunk=[chunk_of[i] for i in used], score=scores)
    left_out = _frame(held_out).assign(held_out=True, chunk=0, score=float("nan"))
    whole = pd.concat([trained, left_out], ignore_index=True)
    first = ["id", "source", "held_out", "chunk", "score"]
    return whole[first + [name for name in whole if name not in first]]


def _frame(table: PairTable) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "id": table.ids,
            "source": list(table.sources),
            "prompt_tokens": [len(row.prompt) for row in table.rows],
            "chosen_tokens": table.lengths_N2[:, 0],
            "rejected_tokens": table.lengths_N2[:, 1],
            "chosen_rating": [pair.chosen_rating for pair in table.pairs],
            "rejected_rating": [pair.rejected_rating for pair in table.pairs],
        }
    )


def _link_steps(folder: Path, evaluator: Evaluator) -> None:
    """Make steps/t a link to M_t in the store, and rounds/t.json one to the answers that its pairs were made from."""
    for t, measured in enumerate(evaluator.measured[1:], start=1):
        assert measured.step  # only S has none
        _link(folder / "steps" / str(t), measured.model.folder)
        if made_from := measured.step.spec.chunk.made_from:
            _link(folder / "rounds" / f"{t}.json", made_from)


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    os.symlink(target, link)


def _write_answers(folder: Path, evaluator: Evaluator) -> None:
    """Write the answers of evaluate=generate, if any: the formats of AlpacaEval 2 and MT-Bench, and decoding.json."""
    for t, measured in enumerate(evaluator.measured):
        for given in measured.answers:
            write_formats(folder, f"{folder.parent.name}-M_{t}", given["answers"])
            write_json(folder / "decoding.json", given["decoding"])
