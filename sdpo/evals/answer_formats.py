"""The formats in which benchmarks read a model's answers."""

import json
from pathlib import Path

from sdpo.data.prompts import Prompt
from sdpo.evals.generation import Answer


def transcripts(prompts: list[Prompt], answers_of: list[list[Answer]]) -> list[dict]:
    """Each prompt as JSON, with the texts of its answers."""
    texts = [[answer["text"] for answer in turns] for turns in answers_of]
    return [prompt._asdict() | {"answers": text} for prompt, text in zip(prompts, texts, strict=True)]


def write_formats(folder: Path, name: str, answered: list[dict]) -> None:
    """Write `transcripts` as `<name>.alpaca_eval.json` (first turns only) and as `<name>.mt_bench.jsonl`."""
    folder.mkdir(exist_ok=True)
    alpaca = [
        {"instruction": row["turns"][0], "output": row["answers"][0], "generator": name, "dataset": row["dataset"]}
        for row in answered
    ]
    (folder / f"{name}.alpaca_eval.json").write_text(json.dumps(alpaca, indent=1))
    mt_bench = [
        {
            "question_id": row["id"],
            "answer_id": f"{name}-{row['id']}",
            "model_id": name,
            "choices": [{"index": 0, "turns": row["answers"]}],
        }
        for row in answered
    ]
    (folder / f"{name}.mt_bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mt_bench))
