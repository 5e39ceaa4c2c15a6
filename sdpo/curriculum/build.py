"""The pairs that each step trains on: the chunks of the split, with scores if the split needs them."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from sdpo.config import Config
from sdpo.console import tell
from sdpo.curriculum import chunking, diagnostics, score_inputs
from sdpo.curriculum.chunking import Score, Split
from sdpo.curriculum.diagnostics import Accuracies
from sdpo.model.packing import tokens_of
from sdpo.store.artifacts import Artifact
from sdpo.train.reference_windows import external
from sdpo.train.setup import Inputs
from sdpo.types import SplitRow


@dataclass
class Curriculum:
    """The chunks of a run, as indices of training pairs, and what decided them.

    All chunks are known from the start, unless score.model is `current`: then the newest model scores the remaining
    pairs before every step.
    """

    inputs: Inputs
    config: Config
    split: Split
    score: Score | None  # None: the split needs no scores
    num_steps: int = 0
    chunks: list[np.ndarray] = field(default_factory=list)
    score_N: np.ndarray | None = None  # of each training pair, the score that decided its chunk
    sources: Accuracies = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    scored_by: list[Artifact] = field(default_factory=list)  # the models whose log-probs decided, in order
    num_tokens_scored: int = 0
    left: np.ndarray | None = None  # the pairs that have no chunk yet; None: all chunks are known

    @cached_property
    def rows(self) -> list[SplitRow]:
        """What the split may know of each training pair."""
        return chunking.split_rows(self.inputs.train)

    @property
    def complete(self) -> bool:
        return len(self.chunks) == self.num_steps

    def indices(self, number: int, newest: Artifact) -> np.ndarray:
        """The pairs of a step (from 0). `newest` is the model of the step before, which may have to score pairs."""
        if number == len(self.chunks):
            assert self.left is not None and self.score_N is not None
            self.score_N[self.left] = self._score(newest, self.left)
            self._take_next_chunk(self.left)
        return self.chunks[number]

    def why_unknown(self, number: int, newest: Artifact) -> str | None:
        """Why `indices` would have to load a model; None if the store has what it reads."""
        if number < len(self.chunks):
            return None
        assert self.left is not None and self.score
        table = self.inputs.train.take(self.left)
        return score_inputs.why_unknown(self.inputs, self.config, self.score.function, newest, table)

    def describe(self) -> dict[str, Any]:
        """What split.json holds. There, pairs are named by their ids."""
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
        """The score with its settings, the keys of the models that it read, and the tokens that it had them score."""
        if self.score is None:
            return None
        settings = {"name": self.score.name, **self.score.function.keywords, "model": self.score.model}
        weights = [model.key for model in self.scored_by] if self.score.model else []
        if "path" in settings:
            weights.append(external(settings).key)
        return settings | {"weights": weights, "tokens": self.num_tokens_scored if self.score.model else None}

    def _cut(self) -> None:
        """Make all chunks."""
        self.chunks = self._divide(self.split, np.arange(len(self.inputs.train)))
        self.num_steps = len(self.chunks)
        if beyond := [t for t in self.config.steps if t > self.num_steps]:
            tell(f"warning: steps.{beyond[0]} changes nothing, because there are only {self.num_steps} steps")

    def _cut_first(self) -> None:
        """Make the first chunk; the others are made when their steps begin."""
        left = self._kept()
        self.num_steps = self.split.function.keywords["num_chunks"] or len(set(self.inputs.train.sources[left]))
        tokens = sum(map(tokens_of, self.inputs.train.take(left).rows))
        tell(
            f"score.model=current scores the remaining pairs before each of {self.num_steps} steps: about "
            f"{tokens * (self.num_steps - 1) // 2:,} tokens of forward passes more than scoring once"
        )
        self._take_next_chunk(left)

    def _take_next_chunk(self, left: np.ndarray) -> None:
        """Divide the pairs that are left into as many chunks as are missing, and take the first."""
        split = self.split.for_rest(self.num_steps - len(self.chunks))
        self.chunks.append(self._divide(split, left)[0])
        self.left = np.setdiff1d(left, self.chunks[-1])

    def _divide(self, split: Split, indices: np.ndarray) -> list[np.ndarray]:
        """The chunks that the split makes of these pairs; it names pairs by their ids."""
        rows = [self.rows[i] for i in indices]
        chunks = chunking.divide(split, rows, self._score_by_id(), self.config.seed)
        return [self.inputs.train.indices(ids) for ids in chunks]

    def _kept(self) -> np.ndarray:
        """The pairs that `split.keep` keeps."""
        kept = self.split.kept(self.rows, self._score_by_id())
        return self.inputs.train.indices(row.id for row in kept)

    def _score_by_id(self) -> dict[str, float] | None:
        if self.score_N is None:
            return None
        return dict(zip(self.inputs.train.ids, self.score_N.tolist(), strict=True))

    def _score(self, model: Artifact, indices: np.ndarray) -> np.ndarray:
        """The scores of these pairs under a model."""
        assert self.score
        table = self.inputs.train.take(indices)
        self.scored_by.append(model)
        self.num_tokens_scored += sum(map(tokens_of, table.rows))
        return score_inputs.scores(self.inputs, self.config, self.score.function, model, table)


def build(inputs: Inputs, config: Config, initial: Artifact) -> Curriculum:
    """The chunks of a run. If the split needs scores, S scores the pairs; reasons to doubt the order are printed."""
    split = chunking.bind_split(config.split)
    score = chunking.bind_score(config.score, split) if split.needs_scores else None
    curriculum = Curriculum(inputs, config, split, score)
    if score:
        curriculum.score_N = curriculum._score(initial, np.arange(len(inputs.train)))
        curriculum.sources = diagnostics.accuracies(inputs, config, score, curriculum.score_N, curriculum._kept())
        curriculum.warnings = diagnostics.warnings(split, score, curriculum.sources)
        for warning in curriculum.warnings:
            tell(f"warning: {warning}")
    if score and score.model == "current":
        curriculum._cut_first()
    else:
        curriculum._cut()
    return curriculum


def why_unknown(inputs: Inputs, config: Config, initial: Artifact) -> str | None:
    """Why `build` would have to load or train a model to score the pairs; None if the store has what it reads."""
    split = chunking.bind_split(config.split)
    score = chunking.bind_score(config.score, split)
    if reason := score_inputs.why_unknown(inputs, config, score.function, initial, inputs.train):
        return reason
    curriculum = Curriculum(inputs, config, split, score)
    curriculum.score_N = curriculum._score(initial, np.arange(len(inputs.train)))
    has_accuracies = diagnostics.has_accuracies(inputs, score, curriculum._kept())
    return None if has_accuracies else "the pairs are not scored yet"
