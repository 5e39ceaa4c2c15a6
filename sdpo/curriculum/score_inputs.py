"""What scores read, supplied by name and only where it is read: models run once, their numbers lie in the store."""

from collections.abc import Callable

import numpy as np

from sdpo.binding import needs
from sdpo.config import Config
from sdpo.curriculum import crossfit
from sdpo.data.preferences import prompt_key
from sdpo.data.tokenize import TokenPair, response_lengths
from sdpo.evals import reward_model
from sdpo.model.packing import tokens_of
from sdpo.store import Artifact
from sdpo.train.setup import Inputs
from sdpo.variants.split import Row


def rows_of(inputs: Inputs) -> list[Row]:
    """What a split may know of the training pairs, in their order."""
    prompts = {row.id: prompt_key(inputs.pairs[row.id].prompt) for row in inputs.train}
    return [Row(row.id, inputs.pairs[row.id].source, prompts[row.id], tokens_of(row)) for row in inputs.train]


def scored(
    inputs: Inputs, config: Config, function: Callable, model: Artifact, rows: list[TokenPair]
) -> dict[str, float]:
    """The score of each of these training pairs by id; `model` is the one whose log-probs are read, if any are.

    ValueError where a score is not a finite number.
    """
    bench, pairs, settings = inputs.bench, [inputs.pairs[row.id] for row in rows], getattr(function, "keywords", {})
    data = {
        "logps": lambda: bench.logprobs(model, rows),
        "base_logps": lambda: reward_model.base_logps(settings, rows, bench),
        "rewards": lambda: reward_model.rewards(settings, pairs, bench),
        "ratings": lambda: inputs.chunk([row.id for row in rows]).ratings_N2,
        "lengths": lambda: response_lengths(rows),
        "prompt_lengths": lambda: np.array([len(row.prompt) for row in rows]),
        "margins": lambda: crossfit.margins(inputs, config, rows_of(inputs), **settings),
    }
    values = np.asarray(function(*(data[name]() for name in needs(function))), dtype=np.float64)
    if not np.isfinite(values).all():
        where = rows[int(np.argmin(np.isfinite(values)))].id
        raise ValueError(f"the score of training pair {where} is not a finite number: repair the score or the pair")
    return dict(zip((row.id for row in rows), values.tolist(), strict=True))
