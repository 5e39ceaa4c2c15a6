"""The laboratory's demonstrations and preference pairs. A source is a sampler of answers and a judge of two answers."""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdpo import config
from sdpo.data.preferences import Pair, Preferences, describe
from sdpo.data.schemas import Message
from sdpo.errors import UserError
from sdpo.lab import world
from sdpo.lab.model import STOP, VOCABULARY
from sdpo.model.sampling import sample
from sdpo.types import TokenPair

NUM_ANSWERS = 4  # that S gives to a prompt; two of them make a pair
PROMPT_BATCH = 250  # prompts that a sampler answers at once

Rated = tuple[float, str]  # the judge's rating of an answer, and the answer
Sampler = Callable[[list[str], random.Random], list[list[str]]]  # prompts -> answers to each


def demonstrations(lab: config.LabData, seed: int) -> list[TokenPair]:
    """The demonstrations that S is trained on: right answers, misconceptions and slips, with fillers.

    `rejected` is empty. Token ids are looked up directly, because template and tokenizer would take seconds per run.
    """
    rng = random.Random(f"demonstrations {seed}")
    prompts = world.draw(lab.num_demonstrations, "train", rng, taken=set())
    nothing = np.empty(0, dtype=np.int32)
    return [
        TokenPair(f"demonstrations-{i:05d}", _ids(prompt), _ids([*world.demonstrate(prompt, rng), STOP]), nothing)
        for i, prompt in enumerate(prompts)
    ]


def _ids(characters: Iterable[str]) -> np.ndarray:
    return np.array([VOCABULARY[character] for character in characters], dtype=np.int32)


def preferences(data: config.Data, initial_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Preferences:
    """The pairs of every source, for training and held out. No two pairs share a prompt.

    Raises UserError if a family does not exist, or if S gives the same answer every time.
    """

    def on_policy(prompts: list[str], rng: random.Random) -> list[list[str]]:
        text = sample(initial_model, tokenizer, prompts, NUM_ANSWERS, seed=rng.getrandbits(32)).text
        return [text[i : i + NUM_ANSWERS] for i in range(0, len(text), NUM_ANSWERS)]

    samplers: dict[str, Sampler] = {"teacher": _teacher, "edits": _edits, "on_policy": on_policy}
    pairs: dict[str, list[Pair]] = {"train": [], "held_out": []}
    taken: set[str] = set()
    for name, source in data.lab.sources.items():
        if unknown := set(source.families) - set(world.FAMILIES):
            known = ", ".join(world.FAMILIES)
            raise UserError(f"data.lab.sources.{name}.families: there is no {min(unknown)!r}; there are {known}")
        if source.num_pairs == 0:
            continue
        for role, num in ("train", source.num_pairs), ("held_out", data.lab.num_held_out):
            rng = random.Random(f"{name} {role} {data.seed}")
            judged = islice(_judged(source, samplers[source.sampler], role, rng, taken), num)
            for i, (prompt, (high, chosen), (low, rejected)) in enumerate(judged):
                turns = (Message(role="user", content=prompt),)
                pairs[role].append(Pair(f"{name}-{role}-{i:05d}", name, turns, chosen, rejected, high, low))
    return Preferences(
        pairs["train"], pairs["held_out"], report={"sources": {role: describe(some) for role, some in pairs.items()}}
    )


def _teacher(prompts: list[str], rng: random.Random) -> list[list[str]]:
    """The right answer; then, in random order, the misconception and the answers of the other families' rules."""

    def wrong(prompt: str) -> list[str]:
        others = [world.answer(prompt, family) for family in world.FAMILIES if family != world.family_of(prompt)]
        return rng.sample([world.misconception(prompt), *others], len(others) + 1)

    return [[world.answer(prompt), *wrong(prompt)] for prompt in prompts]


def _edits(prompts: list[str], rng: random.Random) -> list[list[str]]:
    """The right answer, and the right answer with one wrong letter."""
    return [[world.answer(prompt), world.slip(world.answer(prompt), rng)] for prompt in prompts]


def _judged(
    source: config.LabSource, sampler: Sampler, role: str, rng: random.Random, taken: set[str]
) -> Iterator[tuple[str, Rated, Rated]]:
    """An endless stream of new prompts, each with its preferred answer and another one."""
    while True:
        prompts = world.draw(PROMPT_BATCH, role, rng, taken, source.families)
        answers = [list(dict.fromkeys(filter(None, texts))) for texts in sampler(prompts, rng)]
        asked = [(prompt, texts) for prompt, texts in zip(prompts, answers, strict=True) if len(texts) > 1]
        if not asked:
            raise UserError(f"S gives only one answer to each of {len(prompts)} prompts: train it less (model.sft)")
        for prompt, texts in asked:
            yield prompt, *_judge(source, prompt, texts, rng)


def _judge(source: config.LabSource, prompt: str, texts: list[str], rng: random.Random) -> tuple[Rated, Rated]:
    """Compare the first answer with the first one of a different value, or the second one if all values are equal.

    Returns the preferred answer, then the other one. With Gumbel noise on the values this is a Bradley-Terry judge: it
    prefers the better answer with probability sigmoid(gap / temperature).
    """

    def value(text: str) -> float:
        return world.gold(prompt, text) + source.filler_bonus * text.count(world.FILLER)

    other = min(texts[1:], key=lambda text: value(text) == value(texts[0]))
    rated = [(value(text) - source.temperature * math.log(rng.expovariate(1)), text) for text in (texts[0], other)]
    (high, better), (low, worse) = sorted(rated, key=lambda one: one[0], reverse=True)
    if rng.random() < source.flipped:
        better, worse = worse, better
    return (high, better), (low, worse)
