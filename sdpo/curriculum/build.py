"""Which pairs each step trains on: the split's chunks, with scores computed only if the split asks for them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sdpo.config import Config
from sdpo.console import tell
from sdpo.curriculum import chunking, diagnostics, score_inputs
from sdpo.curriculum.chunking import Score, Split, split_rows
from sdpo.curriculum.diagnostics import Accuracies
from sdpo.model.packing import tokens_of
from sdpo.store import Artifact
from sdpo.train.reference_windows import external
from sdpo.train.setup import Inputs
from sdpo.types import SplitRow


@dataclass
class Curriculum:
    """The chunks of a run, as indices of training pairs, and what decided them.

    All chunks are known from the start, unless the newest model scores what remains before every step.
    """

    inputs: Inputs
    config: Config
    split: Split
    score: Score | None  # None: the split reads no scores
    rows: list[SplitRow]  # of all training pairs
    num_steps: int = 0
    chunks: list[np.ndarray] = field(default_factory=list)
    score_N: np.ndarray | None = None  # the score that decided each pair's place
    sources: Accuracies = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    scored_by: list[Artifact] = field(default_factory=list)  # the models whose log-probs decided, in order
    num_tokens_scored: int = 0
    left: np.ndarray | None = None  # the pairs that no chunk has yet, if what remains is scored again

    @property
    def complete(self) -> bool:
        return len(self.chunks) == self.num_steps

    def chunk(self, number: int, newest: Artifact) -> np.ndarray:
        """The pairs of a step (counted from 0); `newest` is the model of the step before, which scores what remains."""
        if number == len(self.chunks):
            assert self.left is not None and self.score_N is not None
            self.score_N[self.left] = _score(self, newest, self.left)
            self.take_next_chunk()
        return self.chunks[number]

    def why_unknown(self, number: int, newest: Artifact) -> str | None:
        """Why `chunk` would have to load a model; None if the store has what it reads."""
        if number < len(self.chunks):
            return None
        assert self.left is not None and self.score
        table = self.inputs.train.take(self.left)
        return score_inputs.why_unknown(self.inputs, self.config, self.score.function, newest, table)

    def take_next_chunk(self) -> None:
        """Cut what remains into as many chunks as remain, and take the first."""
        assert self.left is not None
        split = self.split.for_rest(self.num_steps - len(self.chunks))
        self.chunks.append(_divide(self, split, self.left)[0])
        self.left = np.setdiff1d(self.left, self.chunks[-1])

    def describe(self) -> dict[str, Any]:
        """What split.json holds; here ids stand for pairs."""
        table = self.inputs.train
        used = np.zeros(len(table), dtype=bool)
        used[np.concatenate(self.chunks)] = True
        return {
            "chunks": [table.take(indices).ids for indices in self.chunks],
            "dropped": table.take(np.flatnonzero(~used)).ids,
            "score": self._describe_score(),
            "sources": self.sources,
            "warnings": self.warnings,
            "receipts": diagnostics.chunk_receipts(self.chunks, table, self.score_N),
        }

    def _describe_score(self) -> dict[str, Any] | None:
        """The score as it was used, the keys of the weights that it read, and the tokens that these read for it."""
        if self.score is None:
            return None
        settings = {"name": self.score.name, **self.score.function.keywords, "model": self.score.model}
        weights = [model.key for model in self.scored_by] if self.score.model else []
        if "path" in settings:
            weights.append(external(settings).key)
        return settings | {"weights": weights, "tokens": self.num_tokens_scored if self.score.model else None}


def build(inputs: Inputs, config: Config, initial: Artifact) -> Curriculum:
    """The chunks of a run, scored by S where scores are read. Prints reasons to doubt the order."""
    split, table = chunking.bind_split(config.split), inputs.train
    curriculum = Curriculum(inputs, config, split, None, split_rows(table))
    everything = np.arange(len(table))
    if split.needs_scores:
        _score_everything(curriculum, initial)
    if curriculum.score and curriculum.score.model == "current":
        curriculum.left = _kept(curriculum)
        curriculum.num_steps = split.function.keywords["num_chunks"] or len(set(table.sources[curriculum.left]))
        _tell_cost(curriculum)
        curriculum.take_next_chunk()
    else:
        curriculum.chunks = _divide(curriculum, split, everything)
        curriculum.num_steps = len(curriculum.chunks)
        if beyond := [t for t in config.steps if t > curriculum.num_steps]:
            tell(f"warning: steps.{beyond[0]} changes nothing, because there are only {curriculum.num_steps} steps")
    return curriculum


def why_unknown(inputs: Inputs, config: Config, initial: Artifact) -> str | None:
    """Why `build` would have to load or train a model to score the pairs; None if the store has what it reads."""
    split = chunking.bind_split(config.split)
    score = chunking.bind_score(config.score, split)
    if reason := score_inputs.why_unknown(inputs, config, score.function, initial, inputs.train):
        return reason
    curriculum = Curriculum(inputs, config, split, score, split_rows(inputs.train))
    curriculum.score_N = _score(curriculum, initial, np.arange(len(inputs.train)))
    has_accuracies = diagnostics.has_accuracies(inputs, score, _kept(curriculum))
    return None if has_accuracies else "the pairs are not scored yet"


def _score_everything(curriculum: Curriculum, initial: Artifact) -> None:
    inputs, config = curriculum.inputs, curriculum.config
    curriculum.score = score = chunking.bind_score(config.score, curriculum.split)
    curriculum.score_N = _score(curriculum, initial, np.arange(len(inputs.train)))
    curriculum.sources = diagnostics.accuracies(inputs, config, score, curriculum.score_N, _kept(curriculum))
    curriculum.warnings = diagnostics.warnings(curriculum.split, score, curriculum.sources)
    for warning in curriculum.warnings:
        tell(f"warning: {warning}")


def _score(curriculum: Curriculum, model: Artifact, indices: np.ndarray) -> np.ndarray:
    """The scores of these pairs under a model."""
    assert curriculum.score
    table = curriculum.inputs.train.take(indices)
    curriculum.scored_by.append(model)
    curriculum.num_tokens_scored += sum(map(tokens_of, table.rows))
    return score_inputs.scores(curriculum.inputs, curriculum.config, curriculum.score.function, model, table)


def _divide(curriculum: Curriculum, split: Split, indices: np.ndarray) -> list[np.ndarray]:
    """The chunks of these pairs. Splits speak of ids."""
    rows = [curriculum.rows[i] for i in indices]
    chunks = chunking.divide(split, rows, _by_id(curriculum), curriculum.config.seed)
    return [curriculum.inputs.train.indices(ids) for ids in chunks]


def _kept(curriculum: Curriculum) -> np.ndarray:
    """The pairs that `split.keep` keeps."""
    kept = curriculum.split.kept(curriculum.rows, _by_id(curriculum))
    return curriculum.inputs.train.indices(row.id for row in kept)


def _by_id(curriculum: Curriculum) -> dict[str, float] | None:
    if curriculum.score_N is None:
        return None
    return dict(zip(curriculum.inputs.train.ids, curriculum.score_N.tolist(), strict=True))


def _tell_cost(curriculum: Curriculum) -> None:
    assert curriculum.left is not None
    tokens = sum(map(tokens_of, curriculum.inputs.train.take(curriculum.left).rows))
    tell(
        f"score.model=current scores what remains before each of {curriculum.num_steps} steps: about "
        f"{tokens * (curriculum.num_steps - 1) // 2:,} tokens of forward passes more than scoring once"
    )
