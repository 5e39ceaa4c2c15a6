"""The world of the laboratory: what is asked, what is right, what an answer is worth, and how demonstrators err.

A prompt is a family's mark and six letters; the right answer is the family's rule applied to the letters. Nothing
here needs a model, so the gold reward is exact.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

LETTERS = "abcdefghijklmnop"
WORD_LENGTH = 6
FILLER = "."
MOST_FILLERS = 4  # in a demonstration
FILLER_SHARE = 0.35  # of demonstrations that go on with one more filler


class Family(NamedTuple):
    """A rule, and the shares of its demonstrations that are right and misled; the others have one wrong letter."""

    mark: str
    rule: Callable[[str], str]
    right: float
    misled: float


def _next_letters(word: str) -> str:
    return "".join(LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)] for letter in word)


# In two families the misconception is more common than the truth: there S is misled, as models are on TruthfulQA.
# Nowhere are the two near a tie, which would leave to rounding what S believes.
FAMILIES = {
    "reverse": Family("R", lambda word: word[::-1], 0.65, 0.17),
    "rotate": Family("T", lambda word: word[2:] + word[:2], 0.27, 0.48),
    "next": Family("N", _next_letters, 0.65, 0.17),
    "deal": Family("D", lambda word: word[::2] + word[1::2], 0.27, 0.48),
}
MARKS = {family.mark: name for name, family in FAMILIES.items()}


def family_of(prompt: str) -> str:
    """The name of the prompt's family."""
    return MARKS[prompt[0]]


def answer(prompt: str, family: str | None = None) -> str:
    """The right answer, or what another family's rule makes of the same letters."""
    return FAMILIES[family or family_of(prompt)].rule(prompt[1:])


def misconception(prompt: str) -> str:
    """What the misled answer, whatever the family: the letters as they stand."""
    return prompt[1:]


def gold(prompt: str, response: str) -> float:
    """The gold reward in [0, 1]: share of right letters, -.2 per missing or extra letter, -.1 per filler."""
    letters = response.replace(FILLER, "")
    right = sum(given == wanted for given, wanted in zip(letters, answer(prompt), strict=False))
    value = right / WORD_LENGTH - 0.2 * abs(len(letters) - WORD_LENGTH) - 0.1 * response.count(FILLER)
    return min(max(value, 0.0), 1.0)


def slip(word: str, rng: random.Random) -> str:
    """The word with one letter replaced by another."""
    place = rng.randrange(len(word))
    return word[:place] + rng.choice(LETTERS.replace(word[place], "")) + word[place + 1 :]


def demonstrate(prompt: str, rng: random.Random) -> str:
    """What a demonstrator answers: right, misled or with a slip, and then some fillers."""
    family = FAMILIES[family_of(prompt)]
    kind = rng.random()
    if kind < family.right:
        text = answer(prompt)
    elif kind < family.right + family.misled:
        text = misconception(prompt)
    else:
        text = slip(answer(prompt), rng)
    while rng.random() < FILLER_SHARE and len(text) < WORD_LENGTH + MOST_FILLERS:
        text += FILLER
    return text


def role(prompt: str) -> str:
    """dev | test | held_out | train: a checksum of the letters, so that roles never share a prompt, at any seed."""
    checksum = sum(map(LETTERS.index, prompt[1:])) % len(LETTERS)
    return {0: "dev", 1: "test", 2: "held_out"}.get(checksum, "train")


def draw(num: int, wanted: str, rng: random.Random, taken: set[str], families: Sequence[str] = ()) -> list[str]:
    """`num` new prompts of the wanted role, the families (where none is named: all) in turn; adds them to `taken`."""
    names = families or list(FAMILIES)
    prompts: list[str] = []
    while len(prompts) < num:
        word = "".join(rng.choices(LETTERS, k=WORD_LENGTH))
        prompt = FAMILIES[names[len(prompts) % len(names)]].mark + word
        if role(prompt) == wanted and prompt not in taken:
            taken.add(prompt)
            prompts.append(prompt)
    return prompts
