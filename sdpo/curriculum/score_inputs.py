"""Scores of pairs. What a score reads is computed only if it reads it; models run once and their numbers are stored."""

from collections.abc import Callable

import numpy as np

from sdpo.binding import inputs_of
from sdpo.config import Config
from sdpo.curriculum import crossfit
from sdpo.data import pair_scores
from sdpo.data.pair_table import PairTable
from sdpo.errors import UserError
from sdpo.evals import reward_model
from sdpo.model import hub
from sdpo.store.artifacts import Artifact
from sdpo.train.setup import Inputs


def scores(inputs: Inputs, config: Config, function: Callable, model: Artifact, table: PairTable) -> np.ndarray:
    """The scores [N] of some training pairs. If the score reads log-probs, they are those of `model`.

    Raises UserError if a score is not a finite number.
    """
    runner, settings = inputs.runner, getattr(function, "keywords", {})
    data = {
        "logps": lambda: runner.logprobs(model, table.rows),
        "base_logps": lambda: reward_model.base_logps(settings, table.rows, runner),
        "rewards": lambda: reward_model.rewards(settings, table.pairs, runner),
        "ratings": lambda: table.ratings_N2,
        "pair_scores": lambda: pair_scores.read(table, **settings),
        "lengths": lambda: table.lengths_N2,
        "prompt_lengths": lambda: np.array([len(row.prompt) for row in table.rows]),
        "margins": lambda: crossfit.margins(inputs, config, **settings),
    }
    score_N = np.asarray(function(*(data[name]() for name in inputs_of(function))), dtype=np.float64)
    if not np.isfinite(score_N).all():
        id = table.ids[int(np.argmin(np.isfinite(score_N)))]
        raise UserError(f"the score of training pair {id} is not a finite number: repair the score or the pair")
    return score_N


def why_unknown(inputs: Inputs, config: Config, function: Callable, model: Artifact, table: PairTable) -> str | None:
    """Why `scores` would have to load or train a model; None if the store has all that it reads."""
    runner, settings = inputs.runner, getattr(function, "keywords", {})
    path = settings.get("path")
    if path and not hub.is_here(path, settings.get("revision")):
        return f"{path} is not on this machine"
    stored = {
        "logps": lambda: runner.has_logprobs(model, table.rows),
        "base_logps": lambda: reward_model.has_base_logps(settings, table.rows, runner),
        "rewards": lambda: reward_model.has_rewards(settings, table.pairs, runner),
        "margins": lambda: crossfit.has_margins(inputs, config, **settings),
    }
    known = all(stored[name]() for name in inputs_of(function) if name in stored)
    return None if known else "the pairs are not scored yet"
