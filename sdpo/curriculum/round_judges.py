"""What the answers of an on-policy round are worth: the rewards that rounds.judge gives to all answers to a prompt.

Shapes: P prompts, K answers per prompt.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import combinations
from typing import Any

import numpy as np

from sdpo import distributed
from sdpo.config import Rounds
from sdpo.console import tell
from sdpo.data.preferences import Pair
from sdpo.data.prompts import Prompt
from sdpo.errors import UserError
from sdpo.evals import reward_model
from sdpo.evals.generation import Answer
from sdpo.evals.judge import pairwise
from sdpo.evals.judge.chat_endpoint import Endpoint
from sdpo.lab import world
from sdpo.store.artifacts import Store
from sdpo.train.reference_windows import external
from sdpo.train.runner import Runner


def determinants(settings: Rounds) -> dict[str, Any]:
    """What the rewards depend on besides the answers; an endpoint's model is known by its name alone."""
    judge: dict[str, Any] = {"name": settings.judge}
    if settings.judge == "reward_model":
        return judge | {"weights": external(asdict(settings)).key, "template": settings.template}
    if settings.endpoint:
        asked = {name: getattr(settings.endpoint, name) for name in ("url", "model_name", "max_tokens")}
        return judge | asked | {"prompt": pairwise.PROMPT_HASH}
    return judge


def rewards(settings: Rounds, pairs: Sequence[Pair], answers_PK: list[list[Answer]], runner: Runner) -> np.ndarray:
    """The reward of every answer [P, K]; `pairs` have the prompts.

    Raises UserError for a reward that is not a finite number, and as `sdpo.evals.judge.chat_endpoint.ask` does.
    """
    texts_PK = [[answer["text"] for answer in answers] for answers in answers_PK]
    if settings.endpoint:
        return _by_endpoint(Endpoint.of(**asdict(settings.endpoint)), pairs, texts_PK, runner.store)
    answered = [
        replace(pair, chosen=text, rejected=text) for pair, texts in zip(pairs, texts_PK, strict=True) for text in texts
    ]
    if settings.judge == "gold":
        found = np.array([world.gold(pair.prompt[-1]["content"], pair.chosen) for pair in answered])
    else:
        found = reward_model.rewards(asdict(settings), answered, runner)[:, 0]
    if not np.isfinite(found).all():
        raise UserError(f"rounds.judge={settings.judge} gave a reward that is not a finite number")
    return found.reshape(-1, settings.answers)


def _by_endpoint(endpoint: Endpoint, pairs: Sequence[Pair], texts_PK: list[list[str]], store: Store) -> np.ndarray:
    """Every answer's win rate against the others [P, K]: each two are compared in both orders.

    Equal answers tie. So do two on which the judge states no verdict, and the user is told how often.
    """
    duels = [
        (p, i, j)
        for p, texts in enumerate(texts_PK)
        for i, j in combinations(range(len(texts)), 2)
        if texts[i] != texts[j]
    ]
    prompts = [Prompt(pairs[p].id, [_question(pairs[p])], "") for p, _, _ in duels]

    def ask() -> list[pairwise.Judgement]:
        ours, theirs = ([texts_PK[duel[0]][duel[side]] for duel in duels] for side in (1, 2))
        return pairwise.compare(endpoint, prompts, ours, theirs, store)

    judged = distributed.broadcast(ask() if distributed.is_main() else None)
    num = len(texts_PK[0]) if texts_PK else 2  # answers to a prompt; with rounds.share=0 no prompt is asked
    wins_PK, silent = np.full((len(texts_PK), num), 0.5 * (num - 1)), 0
    for (p, i, j), verdict in zip(duels, judged, strict=True):
        stated = [win for win in (verdict.first, verdict.second) if win is not None]
        silent += 2 - len(stated)
        lead = float(np.mean(stated)) - 0.5 if stated else 0.0
        wins_PK[p, i] += lead
        wins_PK[p, j] -= lead
    if silent:
        tell(f"{endpoint.model} stated no verdict in {silent} of {2 * len(duels)} replies, which count as ties")
    return wins_PK / (num - 1)


def _question(pair: Pair) -> str:
    """The prompt as a judge reads it: its only turn, or all turns, each with its role."""
    if len(pair.prompt) == 1:
        return pair.prompt[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in pair.prompt)
