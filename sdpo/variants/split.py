"""Splits: how the training pairs are cut into the chunks of the steps.

The positional parameters name the data that a split reads: `rows`, `scores` ({id: score}, higher is easier) and
`seed`. A split returns the chunks in training order. A chunk is a list of ids in the order of `rows`, so equal sets of
pairs are equal chunks. Rows with equal `prompt` are always in one chunk. Raises UserError if there are too few pairs.
"""

import json
from collections.abc import Hashable
from enum import StrEnum
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from sdpo.errors import UserError
from sdpo.types import Chunks, SplitRow


class Level(StrEnum):
    """What is sorted."""

    source = "source"
    pair = "pair"


class Measure(StrEnum):
    """How easy a source is: the share of its scores above 0 (zeros count half), or their mean."""

    accuracy = "accuracy"
    mean = "mean"


class Equal(StrEnum):
    """What is equal in all chunks."""

    pairs = "pairs"
    tokens = "tokens"


Unit = list[SplitRow]  # rows that must share a chunk


def all_at_once(rows: list[SplitRow]) -> Chunks:
    """One chunk with all pairs: plain DPO."""
    return [[row.id for row in rows]]


def by_source(rows: list[SplitRow], *, order: list[str] | None = None) -> Chunks:
    """One chunk per source, in `order`, else in order of appearance (Kim et al. 2403.19270 v1).

    A pair whose prompt is in an earlier source too goes to that source's chunk. Raises UserError if `order` does not
    name each source once.
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
    """Chunks from easy to hard, by source (Kim et al. 2403.19270 v2: sources sorted by reward accuracy) or by pair.

    Sources with equal `measure` are sorted by their mean score, then by name. Pairs that share a prompt count as one
    pair with their mean score. `num_chunks` null means the number of sources; if it is lower, neighbouring sources
    share a chunk. Chunks are `equal` in pairs or tokens as far as whole sources and prompts allow.
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
    """The chunks of `easy_to_hard` in reverse order, which Kim et al. 2403.19270 did not run."""
    return easy_to_hard(rows, scores, level=level, num_chunks=num_chunks, equal=equal, measure=measure)[::-1]


def random(rows: list[SplitRow], seed: int, *, num_chunks: int) -> Chunks:
    """Random chunks of equal size (Kim et al. 2403.19270 v2, Table 3)."""
    units = _shuffled(_units(rows), np.random.default_rng(seed))
    return _in_row_order(rows, _cut(units, _equal_shares(num_chunks)))


def stratified(rows: list[SplitRow], seed: int, *, num_chunks: int, shares: list[float] | None = None) -> Chunks:
    """Random chunks that have the sources in the same proportion; `shares` are their sizes, null for equal ones.

    Kim et al. 2403.19270 v1 used shares of 0.1667 and 0.8333. Raises UserError if the shares are not `num_chunks`
    positive numbers that sum to 1.
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
    """`num` chunks, each with all pairs. With `start=initial` this is Pre-DPO (2504.15843)."""
    if num < 1:
        raise UserError(f"split.num must be at least 1, not {num}")
    return all_at_once(rows) * num


def replay(rows: list[SplitRow], *, path: str) -> Chunks:
    """The chunks of a saved `split.json`, unchanged. Raises UserError if it is not about exactly these pairs."""
    try:
        saved = json.loads(Path(path).read_text())
        named = {id for part in (*saved["chunks"], saved["dropped"]) for id in part}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"split.path: {path} is not the split.json of a run ({error!r})") from error
    known = {row.id for row in rows}
    if known != named:
        raise UserError(
            f"{path} was made from other data: {len(named - known)} of its pairs are not in the training data "
            f"and {len(known - named)} training pairs are not in it"
        )
    return saved["chunks"]


def _units(rows: list[SplitRow]) -> list[Unit]:
    """Rows grouped by prompt, in an order that does not depend on the order of `rows`."""
    units: dict[Hashable, Unit] = {}
    for row in sorted(rows):
        units.setdefault(row.prompt, []).append(row)
    return list(units.values())


def _shuffled(units: list[Unit], rng: np.random.Generator) -> list[Unit]:
    return [units[i] for i in rng.permutation(len(units))]


def _easiest_sources(rows: list[SplitRow], scores: dict[str, float], measure: Measure) -> list[str]:
    """The sources, easiest first."""
    by_source: dict[str, list[float]] = {}
    for row in sorted(rows):
        by_source.setdefault(row.source, []).append(scores[row.id])
    mean = {source: float(np.mean(values)) for source, values in by_source.items()}
    accuracy = {source: float(np.mean(np.sign(values))) for source, values in by_source.items()}
    first = accuracy if Measure(measure) is Measure.accuracy else mean
    return sorted(by_source, key=lambda source: (-first[source], -mean[source], source))


def _ordered_sources(rows: list[SplitRow], order: list[str], num_chunks: int, equal: Equal = Equal.pairs) -> Chunks:
    """Chunks of whole sources in this order; a prompt of several sources goes to the first of them."""
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
    return [1 / num_chunks] * num_chunks


def _cut(
    units: list[Unit], shares: list[float], equal: Equal = Equal.pairs, kind: str = "prompts"
) -> list[list[SplitRow]]:
    """Cut units into consecutive chunks, none empty, as near to their shares of pairs or tokens as whole units allow.

    `kind` says in an error what the units are.
    """
    if len(units) < len(shares):
        raise UserError(
            f"{len(shares)} chunks were asked for, but there are only {len(units)} {kind} "
            f"({sum(map(len, units))} pairs), and {kind} are never cut: lower split.num_chunks"
        )
    by_pairs = Equal(equal) is Equal.pairs
    ends = np.cumsum([len(unit) if by_pairs else sum(row.tokens for row in unit) for unit in units])
    bounds = [0]
    for i, share in enumerate(np.cumsum(shares)[:-1], start=1):
        nearest = int(np.argmin(np.abs(ends - share * ends[-1]))) + 1
        bounds.append(min(max(nearest, bounds[-1] + 1), len(units) - len(shares) + i))
    return [list(chain(*units[start:end])) for start, end in pairwise([*bounds, len(units)])]


def _in_row_order(rows: list[SplitRow], chunks: list[list[SplitRow]]) -> Chunks:
    position = {row.id: i for i, row in enumerate(rows)}
    return [sorted((row.id for row in chunk), key=position.__getitem__) for chunk in chunks]
