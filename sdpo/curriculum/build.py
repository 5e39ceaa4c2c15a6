"""Which pairs each step trains on: the split's chunks, with scores computed only where the split asks for them."""

from collections.abc import Iterable, Iterator

from sdpo.config import Config
from sdpo.curriculum import chunking, diagnostics, sources
from sdpo.curriculum.chunking import Score, Split
from sdpo.curriculum.score_inputs import rows_of, scored
from sdpo.data.tokenize import TokenPair
from sdpo.metrics import tell
from sdpo.model.packing import tokens_of
from sdpo.store import Artifact
from sdpo.train.reference_windows import external
from sdpo.train.setup import Inputs
from sdpo.variants.split import Chunks, Row


def in_order(inputs: Inputs, config: Config, history: list[Artifact]) -> Iterable[list[str]]:
    """The ids of each step's pairs: a list or, where what remains is scored anew, an iterator over a growing history.

    Reasons to doubt the order are told before the first step trains.
    """
    plan = _plan(inputs, config, history)
    if isinstance(plan, list) and (beyond := [t for t in config.steps if t > len(plan)]):
        tell(f"warning: steps.{beyond[0]} changes nothing, because there are only {len(plan)} steps")
    return plan


def _plan(inputs: Inputs, config: Config, history: list[Artifact]) -> Iterable[list[str]]:
    split, rows = chunking.bind(config.split), rows_of(inputs)
    if not split.needs_scores:
        return chunking.divide(split, rows, None, config.seed)
    score = chunking.bind_score(config.score, split)
    by_id = scored(inputs, config, score.function, history[0], inputs.train)
    kept = split.kept(rows, by_id)
    accuracies = sources.accuracies(inputs, config, score, by_id, [row.id for row in kept])
    for warning in sources.warnings(split, score, accuracies):
        tell(f"warning: {warning}")
    if score.model == "current":
        return _rescoring(inputs, config, history, split, score, kept)
    return chunking.divide(split, rows, by_id, config.seed)


def describe(inputs: Inputs, config: Config, history: list[Artifact], divided: Chunks) -> tuple[dict, dict[str, float]]:
    """What split.json holds, and the score by which each pair got its place; all of it read from the store."""
    split, rows = chunking.bind(config.split), rows_of(inputs)
    used = {id for chunk in divided for id in chunk}
    by_id, about = {}, {"score": None, "sources": {}, "warnings": []}
    if split.needs_scores:
        score = chunking.bind_score(config.score, split)
        by_id = scored(inputs, config, score.function, history[0], inputs.train)
        kept = [row.id for row in rows if row.id in used]
        accuracies = sources.accuracies(inputs, config, score, by_id, kept)
        about = {"sources": accuracies, "warnings": sources.warnings(split, score, accuracies)}
        rounds = _rounds(inputs, score, divided)
        for model, left in zip(history[1:], rounds[1:], strict=False):
            by_id |= scored(inputs, config, score.function, model, left)
        about["score"] = _settings(score, history[: len(rounds)], rounds)
    lengths = {row.id: (len(row.chosen), len(row.rejected)) for row in inputs.train}
    return {
        "chunks": divided,
        "dropped": [row.id for row in rows if row.id not in used],
        **about,
        "receipts": diagnostics.chunk_receipts(divided, rows, lengths, by_id),
    }, by_id


def _rescoring(
    inputs: Inputs, config: Config, history: list[Artifact], split: Split, score: Score, rows: list[Row]
) -> Iterator[list[str]]:
    """The first chunk of what remains, in the order that the newest model gives it, until nothing remains."""
    num_chunks = split.function.keywords["num_chunks"] or len({row.source for row in rows})
    tokens = sum(row.tokens for row in rows)
    tell(
        f"score.model=current scores what remains before each of {num_chunks} steps: about "
        f"{tokens * (num_chunks - 1) // 2:,} tokens of forward passes more than scoring once"
    )
    for left in range(num_chunks, 0, -1):
        ids = {row.id for row in rows}
        here = inputs.train if len(history) == 1 else [row for row in inputs.train if row.id in ids]
        by_id = scored(inputs, config, score.function, history[-1], here)
        chunk = chunking.divide(split.for_rest(left), rows, by_id, config.seed)[0]
        yield chunk
        rows = [row for row in rows if row.id not in set(chunk)]


def _rounds(inputs: Inputs, score: Score, divided: Chunks) -> list[list[TokenPair]]:
    """What was scored: everything and, with score.model=current, what remained before each later step."""
    later = range(1, len(divided)) if score.model == "current" else []
    left = [{id for chunk in divided[t:] for id in chunk} for t in later]
    return [inputs.train] + [[row for row in inputs.train if row.id in ids] for ids in left]


def _settings(score: Score, models: list[Artifact], rounds: list[list[TokenPair]]) -> dict:
    """The score as it was used, with the keys of the weights that it read and the tokens that S and M_t read for it."""
    settings = {"name": score.name, **score.function.keywords, "model": score.model}
    weights = [model.key for model in models] if score.model else []
    if "path" in settings:
        weights.append(external(settings).key)
    tokens = sum(tokens_of(row) for rows in rounds for row in rows) if score.model else None
    return settings | {"weights": weights, "tokens": tokens}
