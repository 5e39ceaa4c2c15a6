"""The exam: prompts that every model answers, and multiple-choice items whose wrong choices are answers of S."""

import random
from dataclasses import dataclass
from math import ceil

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdpo.config import LabData
from sdpo.errors import UserError
from sdpo.lab import world
from sdpo.model.sampling import response_logp, sample

NUM_WRONG = 3  # wrong choices of an item
NUM_ANSWERS = 16  # of S per prompt; the wrong choices are taken from them
DRAWN_PER_ITEM = 1.2  # prompts, because S may give too few wrong answers to some of them


@dataclass(frozen=True)
class Exam:
    """Prompts, in which the families take turns, and items: a prompt, its right answer, then the wrong ones.

    All of it can be written as JSON.
    """

    prompts: list[str]
    num_samples: int  # answers per prompt
    items: list[list[str]]


def set_exam(lab: LabData, initial_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Exam:
    """The exam for all models trained from this S. Its prompts are the same for every S; only wrong choices differ.

    Raises UserError if S gives too few wrong answers for the items.
    """
    rng = random.Random(f"exam {lab.prompts}")
    taken: set[str] = set()
    prompts = world.draw(lab.num_prompts, lab.prompts, rng, taken)
    items = []
    for family in world.FAMILIES:
        drawn = world.draw(ceil(DRAWN_PER_ITEM * lab.num_items), lab.prompts, rng, taken, [family])
        found = _items(drawn, initial_model, tokenizer)
        if len(found) < lab.num_items:
            raise UserError(
                f"S gives three wrong answers to {len(found)} prompts of {family}, but data.lab.num_items is "
                f"{lab.num_items}; ask for fewer items, or train S less"
            )
        items += found[: lab.num_items]
    return Exam(prompts, lab.num_samples, items)


def _items(prompts: list[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    """An item for every prompt to which S gives enough different wrong answers; the likeliest ones are the choices."""
    answers = sample(model, tokenizer, prompts, NUM_ANSWERS, seed=0)
    logp = response_logp(model, answers).tolist()
    items = []
    for i, prompt in enumerate(prompts):
        own = slice(i * NUM_ANSWERS, (i + 1) * NUM_ANSWERS)
        likeliest = dict(sorted(zip(logp[own], answers.text[own], strict=True), reverse=True))
        wrong = [text for text in dict.fromkeys(likeliest.values()) if _is_wrong(prompt, text)]
        if len(wrong) >= NUM_WRONG:
            items.append([prompt, world.answer(prompt), *wrong[:NUM_WRONG]])
    return items


def _is_wrong(prompt: str, text: str) -> bool:
    """Whether the letters of an answer are wrong; fillers alone do not make it wrong."""
    return text.replace(world.FILLER, "") not in ("", world.answer(prompt))
