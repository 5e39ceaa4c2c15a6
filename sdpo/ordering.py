"""Which pairs each step trains on: the split's chunks, with scores computed only where the split asks for them."""

from collections.abc import Iterable, Iterator

import numpy as np

from sdpo import chunks, scores
from sdpo.config import Config, choose, needs
from sdpo.data import prompt_key
from sdpo.inputs import Inputs
from sdpo.packing import tokens_of
from sdpo.splits import Row
from sdpo.store import Artifact


def in_order(inputs: Inputs, config: Config, history: list[Artifact]) -> Iterable[list[str]]:
    """The ids of each step's pairs: a list or, where what remains is scored anew, an iterator over a growing history."""
    split = chunks.bind(config.split)
    rows = [
        Row(row.id, inputs.pairs[row.id].source, prompt_key(inputs.pairs[row.id].prompt), tokens_of(row))
        for row in inputs.train
    ]
    if not split.needs_scores:
        return chunks.divide(split, rows, None, config.seed)
    if config.score["model"] == "current":
        return _rescoring(inputs, config, history, split, rows)
    return chunks.divide(split, rows, score(inputs, config, history[0], rows), config.seed)


def score(inputs: Inputs, config: Config, model: Artifact, rows: list[Row]) -> dict[str, float]:
    """Every row's score by id, read from the store where this model has scored these rows before."""
    wanted = {row.id for row in rows}
    token_rows = [row for row in inputs.train if row.id in wanted]
    function = choose(scores, {k: v for k, v in config.score.items() if k != "model"})
    data = {
        "logps": lambda: inputs.bench.logprobs(model, token_rows),
        "lengths": lambda: np.array([(len(row.chosen), len(row.rejected)) for row in token_rows]),
    }
    values = function(*(data[name]() for name in needs(function)))
    return dict(zip((row.id for row in token_rows), map(float, values), strict=True))


def _rescoring(
    inputs: Inputs, config: Config, history: list[Artifact], split: chunks.Split, rows: list[Row]
) -> Iterator[list[str]]:
    """The easiest chunk of what remains under the newest model, until nothing remains."""
    num_chunks = config.split["num_chunks"] or len({row.source for row in rows})
    for left in range(num_chunks, 0, -1):
        scored = score(inputs, config, history[-1], rows)
        ids = chunks.divide(split.for_rest(left), rows, scored, config.seed)[0]
        yield ids
        taken = set(ids)
        rows = [row for row in rows if row.id not in taken]
