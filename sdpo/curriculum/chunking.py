"""From the settings of a split and its score to checked chunks: what all splits share, and what always holds."""

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
from sdpo.variants import score as rulers
from sdpo.variants import split as splits


class Split(NamedTuple):
    """A split with its settings bound, before any data is seen."""

    function: partial[Chunks]
    keep: float  # share of pairs, the easiest by score
    disjoint_prompts: bool  # pairs that share a prompt share a chunk

    @property
    def needs_scores(self) -> bool:
        return self.keep < 1 or "scores" in inputs_of(self.function)

    def kept(self, rows: list[SplitRow], scores: dict[str, float] | None) -> list[SplitRow]:
        """The share of rows that is kept, those of highest score, in their order (Selective DPO, 2502.09650)."""
        if self.keep == 1:
            return rows
        ranked = sorted(rows, key=lambda row: (-scores[row.id], row.id))
        easiest = {row.id for row in ranked[: math.ceil(self.keep * len(rows))]}
        return [row for row in rows if row.id in easiest]

    def for_rest(self, num_chunks: int) -> "Split":
        """The split of the rows that remain when chunks were taken and the rest is scored anew."""
        return self._replace(function=partial(self.function, num_chunks=num_chunks), keep=1.0)


class Score(NamedTuple):
    """A score with its settings bound, before any data is seen."""

    function: partial
    model: str | None  # whose log-probs it reads: initial (S) | current (M_{t-1}); None where it reads no policy's

    @property
    def name(self) -> str:
        return self.function.func.__name__


def split_rows(table: PairTable) -> list[SplitRow]:
    """What a split may know of the pairs."""
    columns = zip(table.ids, table.sources, table.prompt_keys, map(tokens_of, table.rows), strict=True)
    return [SplitRow(*row) for row in columns]


def bind_split(settings: Settings) -> Split:
    """The split that the settings name. UserError where they do not fit it."""
    own = dict(settings)
    keep, disjoint_prompts = own.pop("keep", 1.0), own.pop("disjoint_prompts", True)
    if isinstance(keep, bool) or not isinstance(keep, float | int) or not 0 < keep <= 1:
        raise UserError(f"split.keep must be above 0 and at most 1, not {keep}")
    if not isinstance(disjoint_prompts, bool):
        raise UserError(f"split.disjoint_prompts must be true or false, not {disjoint_prompts}")
    function = bind(splits, own)
    if (num_chunks := function.keywords.get("num_chunks")) is not None and num_chunks < 1:
        raise UserError(f"split.num_chunks must be at least 1, not {num_chunks}")
    return Split(function, keep, disjoint_prompts)


def bind_score(settings: Settings, split: Split) -> Score:
    """The score that the settings name, for this split. UserError where they do not fit each other."""
    own = dict(settings)
    model = own.pop("model", None)
    score = Score(bind(rulers, own), model)
    allowed = ("initial", "current") if "logps" in inputs_of(score.function) else (None,)
    if model not in allowed:
        what = "initial or current" if model is None or len(allowed) == 2 else "left out: no model of the run is read"
        raise UserError(f"score.model is {model!r}; for score={score.name} it must be {what}")
    ordered = "scores" in inputs_of(split.function) and "num_chunks" in split.function.keywords
    if model == "current" and split.needs_scores and not ordered:
        raise UserError(
            f"score.model=current scores what remains before every step, but split={split.function.func.__name__} "
            "does not take one chunk after another by score: use split=easy_to_hard, or score.model=initial"
        )
    return score


def divide(split: Split, rows: list[SplitRow], scores: dict[str, float] | None, seed: int) -> Chunks:
    """The chunks of the rows, in training order; `scores` are read where `needs_scores` says so.

    UserError where there are too few rows, and where a split gives some rows more often than others, leaves
    out a row that `keep` did not, makes an empty chunk or puts one prompt into two different chunks.
    """
    if not split.disjoint_prompts:
        rows = [row._replace(prompt=row.id) for row in rows]
    rows = split.kept(rows, scores)
    data = {"rows": rows, "scores": scores, "seed": seed}
    chunks = split.function(**{name: data[name] for name in inputs_of(split.function)})
    _check(chunks, rows, complete=split.function.func is not splits.replay)
    return chunks


def _check(chunks: Chunks, rows: list[SplitRow], complete: bool) -> None:
    prompt = {row.id: row.prompt for row in rows}
    times = Counter(id for chunk in chunks for id in chunk)
    if not chunks or not all(chunks):
        raise UserError("split made an empty chunk: lower split.num_chunks, or repair the split")
    if times.keys() - prompt.keys() or (complete and prompt.keys() - times.keys()):
        raise UserError("split left out rows or made some up: repair the split")
    if len(set(times.values())) > 1:
        raise UserError("split gave some rows more often than others: repair the split")
    prompts_of = [{prompt[id] for id in chunk} for chunk in {frozenset(chunk) for chunk in chunks}]
    if len(set().union(*prompts_of)) < sum(map(len, prompts_of)):
        raise UserError("split put one prompt into two chunks: set split.disjoint_prompts=false to allow it")
