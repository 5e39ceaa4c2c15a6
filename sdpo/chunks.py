"""From a split's settings to checked chunks: what every split shares, and what must always hold."""

import math
from collections import Counter
from functools import partial
from typing import NamedTuple

from sdpo import splits
from sdpo.config import Settings, choose, needs
from sdpo.splits import Chunks, Row


class Split(NamedTuple):
    """A split with its settings bound, before any data is seen."""

    function: partial[Chunks]
    keep: float  # share of pairs, the easiest by score
    disjoint_prompts: bool  # pairs that share a prompt share a chunk

    @property
    def needs_scores(self) -> bool:
        return self.keep < 1 or "scores" in needs(self.function)

    def for_rest(self, num_chunks: int) -> "Split":
        """The split of the rows that remain when chunks were taken and the rest is scored anew."""
        return self._replace(function=partial(self.function, num_chunks=num_chunks), keep=1.0)


def bind(settings: Settings) -> Split:
    """The split that the settings name. ValueError where they do not fit it."""
    own = dict(settings)
    keep, disjoint_prompts = own.pop("keep", 1.0), own.pop("disjoint_prompts", True)
    if isinstance(keep, bool) or not isinstance(keep, float | int) or not 0 < keep <= 1:
        raise ValueError(f"split.keep must be above 0 and at most 1, not {keep}")
    if not isinstance(disjoint_prompts, bool):
        raise ValueError(f"split.disjoint_prompts must be true or false, not {disjoint_prompts}")
    function = choose(splits, own)
    if (num_chunks := function.keywords.get("num_chunks")) is not None and num_chunks < 1:
        raise ValueError(f"split.num_chunks must be at least 1, not {num_chunks}")
    return Split(function, keep, disjoint_prompts)


def divide(split: Split, rows: list[Row], scores: dict[str, float] | None, seed: int) -> Chunks:
    """The chunks of the rows, in training order; `scores` are read where `needs_scores` says so.

    ValueError where there are too few rows, and where a split gives some rows more often than others, leaves
    out a row that `keep` did not, makes an empty chunk or puts one prompt into two different chunks.
    """
    if not split.disjoint_prompts:
        rows = [row._replace(prompt=row.id) for row in rows]
    if split.keep < 1:
        rows = _easiest(rows, scores, split.keep)
    data = {"rows": rows, "scores": scores, "seed": seed}
    chunks = split.function(**{name: data[name] for name in needs(split.function)})
    _check(chunks, rows, complete=split.function.func is not splits.replay)
    return chunks


def _easiest(rows: list[Row], scores: dict[str, float], share: float) -> list[Row]:
    """The rows of highest score, in their order (Selective DPO, 2502.09650)."""
    ranked = sorted(rows, key=lambda row: (-scores[row.id], row.id))
    easiest = {row.id for row in ranked[: math.ceil(share * len(rows))]}
    return [row for row in rows if row.id in easiest]


def _check(chunks: Chunks, rows: list[Row], complete: bool) -> None:
    prompt = {row.id: row.prompt for row in rows}
    times = Counter(id for chunk in chunks for id in chunk)
    if not chunks or not all(chunks):
        raise ValueError("split made an empty chunk: lower split.num_chunks, or repair the split")
    if times.keys() - prompt.keys() or (complete and prompt.keys() - times.keys()):
        raise ValueError("split left out rows or made some up: repair the split")
    if len(set(times.values())) > 1:
        raise ValueError("split gave some rows more often than others: repair the split")
    prompts_of = [{prompt[id] for id in chunk} for chunk in {frozenset(chunk) for chunk in chunks}]
    if len(set().union(*prompts_of)) < sum(map(len, prompts_of)):
        raise ValueError("split put one prompt into two chunks: set split.disjoint_prompts=false to allow it")
