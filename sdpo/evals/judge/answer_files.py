"""Answers of other models, from the files in which benchmarks keep them."""

from typing import Any, NamedTuple

from sdpo.data.cells import BadRow, parse_row
from sdpo.data.prompts import Prompt
from sdpo.data.readers import read_file
from sdpo.errors import UserError


class Answers(NamedTuple):
    model: str  # its name
    answers: list[list[str]]  # by prompt and turn


def read(file: str, prompts: list[Prompt]) -> Answers:
    """A model's answers to `prompts`; those to others are not used.

    Rows are AlpacaEval's (instruction, output, generator; the instruction is a prompt's first turn), MT-Bench's
    (question_id, choices, model_id) or Arena-Hard's (uid, messages, model). Raises UserError for another layout, an
    answer that is missing or stands twice, and answers of several models.
    """
    found: dict[Any, list[str]] = {}
    models: dict[str, None] = {}
    try:
        for row in (parse_row(row) for _, row in read_file(file).rows):
            asked, said, model = _parts(row)
            if asked in found:
                raise ValueError(f"two answers to {asked!r}")
            if not all(isinstance(text, str) for text in said):
                raise TypeError(f"the answer to {asked!r} is no text")
            found[asked], models[model] = said, None
        (model,) = models
    except (BadRow, LookupError, ValueError, TypeError) as error:
        raise UserError(
            f"{file}: is no file of one model's answers of AlpacaEval, Arena-Hard or MT-Bench ({error!r})"
        ) from error
    answers = [found.get(prompt.id) or found.get(prompt.turns[0]) for prompt in prompts]
    if missing := [prompt for prompt, said in zip(prompts, answers, strict=True) if not said]:
        raise UserError(f"{file}: has no answer to {len(missing)} of {len(prompts)} prompts, such as {missing[0].id}")
    return Answers(model, [said for said in answers if said])


def _parts(row: dict[str, Any]) -> tuple[Any, list[str], str]:
    """What was asked (its id or its text), the answers by turn, and the model."""
    if "choices" in row:
        (choice,) = row["choices"]
        return row["question_id"], choice["turns"], row["model_id"]
    if "messages" in row:
        said = row["messages"][-1]["content"]
        return row["uid"], [said["answer"] if isinstance(said, dict) else said], row["model"]
    return row["instruction"], [row["output"]], row["generator"]
