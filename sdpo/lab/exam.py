"""The exam: prompts that every model answers, and multiple-choice items whose wrong choices S itself came up with."""

import random
from dataclasses import dataclass
from math import ceil

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdpo.config import LabData
from sdpo.errors import UserError
from sdpo.lab import world
from sdpo.model.sampling import response_logp, sample

NUM_WRONG = 3  # wrong choices of an item
NUM_ASKED = 16  # answers of S per item, among which the wrong choices are looked for
SPARE = 1.2  # prompts drawn per item that is wanted: S may have too few wrong answers to some


@dataclass(frozen=True)
class Exam:
    """Plain JSON. The prompts of all families take turns; an item is a prompt, its right answer and wrong ones."""

    prompts: list[str]
    num_samples: int  # answers per prompt
    items: list[list[str]]


def set_exam(settings: LabData, initial_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Exam:
    """The exam for models that come from this S: its prompts are the same for every S, only wrong choices differ.

    Raises UserError where S has too few wrong answers to make items of.
    """
    rng, taken = random.Random(f"exam {settings.prompts}"), set()
    prompts = world.draw(settings.num_prompts, settings.prompts, rng, taken)
    items = []
    for family in world.FAMILIES:
        asked = world.draw(ceil(SPARE * settings.num_items), settings.prompts, rng, taken, [family])
        found = _items(asked, initial_model, tokenizer)
        if len(found) < settings.num_items:
            raise UserError(
                f"S gives three wrong answers to {len(found)} prompts of {family}, and data.lab.num_items is "
                f"{settings.num_items}; ask for fewer, or train S less"
            )
        items += found[: settings.num_items]
    return Exam(prompts, settings.num_samples, items)


def _items(prompts: list[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    """An item for every prompt with enough wrong answers: those that S finds likeliest, of the ones it gave."""
    answers = sample(model, tokenizer, prompts, NUM_ASKED, seed=0)
    logp = response_logp(model, answers).tolist()
    items = []
    for i, prompt in enumerate(prompts):
        own = slice(i * NUM_ASKED, (i + 1) * NUM_ASKED)
        likeliest = dict(sorted(zip(logp[own], answers.text[own], strict=True), reverse=True))
        wrong = [text for text in dict.fromkeys(likeliest.values()) if _is_wrong(prompt, text)]
        if len(wrong) >= NUM_WRONG:
            items.append([prompt, world.answer(prompt), *wrong[:NUM_WRONG]])
    return items


def _is_wrong(prompt: str, text: str) -> bool:
    """Wrong in its letters; fillers alone do not make an answer wrong."""
    return text.replace(world.FILLER, "") not in ("", world.answer(prompt))
