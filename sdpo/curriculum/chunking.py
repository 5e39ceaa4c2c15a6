"""Binds a split and its score, and divides pairs into chunks: what all splits share, and the checks on their chunks."""

import math
from collections import Counter
from functools import partial
from typing import NamedTuple

from sdpo.binding import bind, inputs_of
from sdpo.config import Settings
from sdpo.data.pair_table import PairTable
from sdpo.errors import UserError
from sdpo.model.packing import tokens_of
from sdpo.types import Chunks, SplitRow
from sdpo.variants import score as score_functions
from sdpo.variants import split as splits


class Split(NamedTuple):
    """A split with its settings bound, before any data is read."""

    function: partial[Chunks]
    keep: float  # the share of pairs that is kept: those of highest score, which are the easiest
    disjoint_prompts: bool  # whether pairs that share a prompt must share a chunk
    within: str = "shuffled"  # the order of training inside a chunk: shuffled | score

    @property
    def needs_scores(self) -> bool:
        return self.keep < 1 or self.within == "score" or "scores" in inputs_of(self.function)

    def kept(self, rows: list[SplitRow], scores: dict[str, float] | None) -> list[SplitRow]:
        """The share of rows with the highest scores, in the order of `rows` (Selective DPO, 2502.09650)."""
        if self.keep == 1:
            return rows
        assert scores is not None
        ranked = sorted(rows, key=lambda row: (-scores[row.id], row.id))
        easiest = {row.id for row in ranked[: math.ceil(self.keep * len(rows))]}
        return [row for row in rows if row.id in easiest]

    def in_order(self, chunk: list[str], scores: dict[str, float] | None) -> list[str]:
        """The chunk in the order in which its pairs are trained, if that is not shuffled; ties stay in their order."""
        if self.within == "shuffled":
            return chunk
        assert scores is not None
        return sorted(chunk, key=scores.__getitem__, reverse=self.function.func is not splits.hard_to_easy)

    def for_rest(self, num_chunks: int) -> "Split":
        """The same split for the rows that remain after some chunks were taken; it keeps all of them."""
        return self._replace(function=partial(self.function, num_chunks=num_chunks), keep=1.0)


class Score(NamedTuple):
    """A score with its settings bound, before any data is read."""

    function: partial
    model: str | None  # whose log-probs it reads: initial (S) or current (M_{t-1}); None if it reads neither

    @property
    def name(self) -> str:
        return self.function.func.__name__


def split_rows(table: PairTable) -> list[SplitRow]:
    """What a split may know of the pairs."""
    columns = zip(table.ids, table.sources, table.prompt_keys, map(tokens_of, table.rows), strict=True)
    return [SplitRow(*row) for row in columns]


def bind_split(settings: Settings) -> Split:
    """The split that the settings name. Raises UserError if a setting is wrong."""
    settings = dict(settings)
    keep, disjoint_prompts = settings.pop("keep", 1.0), settings.pop("disjoint_prompts", True)
    within = settings.pop("within", "shuffled")
    if isinstance(keep, bool) or not isinstance(keep, float | int) or not 0 < keep <= 1:
        raise UserError(f"split.keep must be above 0 and at most 1, not {keep}")
    if not isinstance(disjoint_prompts, bool):
        raise UserError(f"split.disjoint_prompts must be true or false, not {disjoint_prompts}")
    if within not in ("shuffled", "score"):
        raise UserError(f"split.within is {within!r}; it can be shuffled, score")
    function = bind(splits, settings)
    if (num_chunks := function.keywords.get("num_chunks")) is not None and num_chunks < 1:
        raise UserError(f"split.num_chunks must be at least 1, not {num_chunks}")
    return Split(function, keep, disjoint_prompts, within)


def bind_score(settings: Settings, split: Split) -> Score:
    """The score that the settings name. Raises UserError if a setting is wrong, or does not go with the split."""
    settings = dict(settings)
    model = settings.pop("model", None)
    score = Score(bind(score_functions, settings), model)
    allowed = ("initial", "current") if "logps" in inputs_of(score.function) else (None,)
    if model not in allowed:
        expected = "initial or current" if None not in allowed else "left out, because it reads no model of the run"
        raise UserError(f"score.model is {model!r}; for score={score.name} it must be {expected}")
    by_score = "scores" in inputs_of(split.function) and "num_chunks" in split.function.keywords
    if model == "current" and split.needs_scores and not by_score:
        raise UserError(
            "score.model=current scores the remaining pairs before every step, but "
            f"split={split.function.func.__name__} does not take one chunk after another by score: "
            "use split=easy_to_hard, or score.model=initial"
        )
    return score


def divide(split: Split, rows: list[SplitRow], scores: dict[str, float] | None, seed: int) -> Chunks:
    """The chunks of the rows, in training order; `scores` may be None unless the split `needs_scores`.

    Raises UserError if there are too few rows, and if a split has some rows more often than others, leaves out a row
    that `keep` did not, makes an empty chunk, or puts one prompt into two different chunks.
    """
    if not split.disjoint_prompts:
        rows = [row._replace(prompt=row.id) for row in rows]
    rows = split.kept(rows, scores)
    data = {"rows": rows, "scores": scores, "seed": seed}
    chunks = split.function(**{name: data[name] for name in inputs_of(split.function)})
    _check(chunks, rows, complete=split.function.func is not splits.replay)
    return [split.in_order(chunk, scores) for chunk in chunks]


def _check(chunks: Chunks, rows: list[SplitRow], complete: bool) -> None:
    prompt = {row.id: row.prompt for row in rows}
    times = Counter(id for chunk in chunks for id in chunk)
    if not chunks or not all(chunks):
        raise UserError("split made an empty chunk: lower split.num_chunks, or repair the split")
    if times.keys() - prompt.keys() or (complete and prompt.keys() - times.keys()):
        raise UserError("split left out rows or made some up: repair the split")
    if len(set(times.values())) > 1:
        raise UserError("split has some rows more often than others: repair the split")
    prompts_of = [{prompt[id] for id in chunk} for chunk in {frozenset(chunk) for chunk in chunks}]
    if len(set().union(*prompts_of)) < sum(map(len, prompts_of)):
        raise UserError("split put one prompt into two chunks: set split.disjoint_prompts=false to allow it")
