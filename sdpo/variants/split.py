"""Splits: how the training pairs are cut into the chunks of the steps.

The positional parameters say what a split reads: `rows`, `scores` ({id: score}, higher is easier) and `seed`.
It returns the chunks in training order, each a list of ids in the order of `rows`, so that equal sets are
equal chunks. Rows with one `prompt` key always share a chunk. UserError where there are too few pairs.
"""

import json
from collections.abc import Hashable
from enum import StrEnum
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from sdpo.errors import UserError
from sdpo.types import Chunks
from sdpo.types import SplitRow as SplitRow


class Level(StrEnum):
    """What is put in order."""

    source = "source"
    pair = "pair"


class Measure(StrEnum):
    """How easy a source is: the share of its scores above 0 (ties count half), or their mean."""

    accuracy = "accuracy"
    mean = "mean"


class Equal(StrEnum):
    """What chunks have equally much of."""

    pairs = "pairs"
    tokens = "tokens"


Unit = list[SplitRow]  # rows that must share a chunk


def all_at_once(rows: list[SplitRow]) -> Chunks:
    """One chunk of everything: plain DPO."""
    return [[row.id for row in rows]]


def by_source(rows: list[SplitRow], *, order: list[str] | None = None) -> Chunks:
    """One chunk per source in the order given, else in order of appearance (2403.19270 v1). A pair whose
    prompt an earlier source has too goes with that source. UserError where `order` is not the sources.
    """
    sources = list(dict.fromkeys(row.source for row in rows))
    order = order or sources
    if sorted(order) != sorted(sources):
        raise UserError(f"split.order is {order}, but the sources are {sources}: name each of them once")
    return _ordered_sources(rows, order, len(order))


def easy_to_hard(
    rows: list[SplitRow],
    scores: dict[str, float],
    *,
    level: Level = Level.source,
    num_chunks: int | None = None,
    equal: Equal = Equal.pairs,
    measure: Measure = Measure.accuracy,
) -> Chunks:
    """Chunks of falling ease, by source (2403.19270 v2: sources sorted by reward accuracy) or by pair.

    Sources of equal `measure` are told apart by the mean, then by name; pairs that share a prompt count as
    one, of mean score. `num_chunks` null is the number of sources; neighbours are joined where it is less.
    Chunks are `equal` as far as what must stay together allows.
    """
    if num_chunks is None:
        num_chunks = len({row.source for row in rows})
    if Level(level) is Level.source:
        return _ordered_sources(rows, _easiest_sources(rows, scores, measure), num_chunks, equal)
    units = sorted(_units(rows), key=lambda unit: -np.mean([scores[row.id] for row in unit]))
    return _in_row_order(rows, _cut(units, _equal_shares(num_chunks), equal))


def hard_to_easy(
    rows: list[SplitRow],
    scores: dict[str, float],
    *,
    level: Level = Level.source,
    num_chunks: int | None = None,
    equal: Equal = Equal.pairs,
    measure: Measure = Measure.accuracy,
) -> Chunks:
    """The chunks of `easy_to_hard`, in reverse: the order that 2403.19270 did not run."""
    settings = {"level": level, "num_chunks": num_chunks, "equal": equal, "measure": measure}
    return easy_to_hard(rows, scores, **settings)[::-1]


def random(rows: list[SplitRow], seed: int, *, num_chunks: int) -> Chunks:
    """Chunks of equal size drawn at random (2403.19270 v2, Table 3)."""
    units = _shuffled(_units(rows), np.random.default_rng(seed))
    return _in_row_order(rows, _cut(units, _equal_shares(num_chunks)))


def stratified(rows: list[SplitRow], seed: int, *, num_chunks: int, shares: list[float] | None = None) -> Chunks:
    """Every chunk has the sources in the same proportion; `shares` are the chunks', else they are equal.
    2403.19270 v1 drew 0.1667 and 0.8333 from two sources. UserError where shares do not fit.
    """
    shares = shares or _equal_shares(num_chunks)
    if len(shares) != num_chunks or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-3:
        raise UserError(f"split.shares must be {num_chunks} positive numbers that sum to 1, not {shares}")
    rng = np.random.default_rng(seed)
    strata: dict[str, list[Unit]] = {}
    for unit in _units(rows):
        strata.setdefault(unit[0].source, []).append(unit)
    parts = [
        _cut(_shuffled(strata[source], rng), shares, kind=f"prompts of source {source}") for source in sorted(strata)
    ]
    return _in_row_order(rows, [list(chain(*pieces)) for pieces in zip(*parts, strict=True)])


def repeat(rows: list[SplitRow], *, num: int) -> Chunks:
    """Everything, `num` times: with `start=initial` Pre-DPO (2504.15843), else the same data again."""
    if num < 1:
        raise UserError(f"split.num must be at least 1, not {num}")
    return all_at_once(rows) * num


def replay(rows: list[SplitRow], *, path: str) -> Chunks:
    """The chunks of a saved `split.json`, verbatim. UserError where it speaks of other pairs than these."""
    try:
        saved = json.loads(Path(path).read_text())
        named = {id for part in (*saved["chunks"], saved["dropped"]) for id in part}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"split.path: {path} is not the split.json of a run ({error!r})") from error
    known = {row.id for row in rows}
    if known != named:
        raise UserError(
            f"{path} is of other data: {len(named - known)} of its pairs are not in the training data "
            f"and {len(known - named)} training pairs are not in it"
        )
    return saved["chunks"]


def _units(rows: list[SplitRow]) -> list[Unit]:
    """Rows grouped by prompt, in an order that the order of rows does not change."""
    units: dict[Hashable, Unit] = {}
    for row in sorted(rows):
        units.setdefault(row.prompt, []).append(row)
    return list(units.values())


def _shuffled(units: list[Unit], rng: np.random.Generator) -> list[Unit]:
    return [units[i] for i in rng.permutation(len(units))]


def _easiest_sources(rows: list[SplitRow], scores: dict[str, float], measure: Measure) -> list[str]:
    by_source: dict[str, list[float]] = {}
    for row in sorted(rows):
        by_source.setdefault(row.source, []).append(scores[row.id])
    mean = {source: float(np.mean(values)) for source, values in by_source.items()}
    accuracy = {source: float(np.mean(np.sign(values))) for source, values in by_source.items()}
    first = accuracy if Measure(measure) is Measure.accuracy else mean
    return sorted(by_source, key=lambda source: (-first[source], -mean[source], source))


def _ordered_sources(rows: list[SplitRow], order: list[str], num_chunks: int, equal: Equal = Equal.pairs) -> Chunks:
    """Chunks of whole sources; a prompt of several sources goes to the first of them."""
    rank = {source: i for i, source in enumerate(order)}
    merged: list[Unit] = [[] for _ in order]
    for unit in _units(rows):
        merged[min(rank[row.source] for row in unit)] += unit
    for source, unit in zip(order, merged, strict=True):
        if not unit:
            raise UserError(
                f"every prompt of source {source} is in an earlier source too, so its chunk would be empty: "
                "leave the source out, or set split.disjoint_prompts=false"
            )
    return _in_row_order(rows, _cut(merged, _equal_shares(num_chunks), equal, "sources"))


def _equal_shares(num_chunks: int) -> list[float]:
    if num_chunks < 1:
        raise UserError(f"split.num_chunks must be at least 1, not {num_chunks}")
    return [1 / num_chunks] * num_chunks


def _cut(
    units: list[Unit], shares: list[float], equal: Equal = Equal.pairs, kind: str = "prompts"
) -> list[list[SplitRow]]:
    """Consecutive chunks as near to their shares of pairs or tokens as whole units allow, none empty."""
    if len(units) < len(shares):
        raise UserError(
            f"{len(shares)} chunks were asked for, but there are only {len(units)} {kind} "
            f"({sum(map(len, units))} pairs; each of the {kind} stays whole): lower split.num_chunks"
        )
    by_pairs = Equal(equal) is Equal.pairs
    ends = np.cumsum([len(unit) if by_pairs else sum(row.tokens for row in unit) for unit in units])
    bounds = [0]
    for i, share in enumerate(np.cumsum(shares)[:-1], start=1):
        nearest = int(np.argmin(np.abs(ends - share * ends[-1]))) + 1
        bounds.append(min(max(nearest, bounds[-1] + 1), len(units) - len(shares) + i))
    return [list(chain(*units[begin:end])) for begin, end in pairwise([*bounds, len(units)])]


def _in_row_order(rows: list[SplitRow], chunks: list[list[SplitRow]]) -> Chunks:
    position = {row.id: i for i, row in enumerate(rows)}
    return [sorted((row.id for row in chunk), key=position.__getitem__) for chunk in chunks]
