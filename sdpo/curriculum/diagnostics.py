"""What a split did, in numbers: what is in each chunk, and whether an order by difficulty is one by length.

Shape suffixes: N pairs.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from sdpo.variants.split import Chunks, Row

Z_95 = 1.959964  # two-sided 95 % of the normal distribution


def chunk_receipts(
    chunks: Chunks,
    rows: Iterable[Row],
    lengths: dict[str, tuple[int, int]],
    scores: dict[str, float] | None = None,
) -> list[dict]:
    """One record per chunk; `lengths` are {id: (chosen, rejected)} in tokens."""
    by_id = {row.id: row for row in rows}
    return [
        {
            "chunk": t,
            "num_pairs": len(chunk),
            "hash": hashlib.sha256("\n".join(chunk).encode()).hexdigest(),
            "sources": dict(Counter(by_id[id].source for id in chunk)),
            "mean_score": float(np.mean([scores[id] for id in chunk])) if scores else None,
            "mean_tokens": float(np.mean([by_id[id].tokens for id in chunk])),
            "mean_chosen_tokens": float(np.mean([lengths[id][0] for id in chunk])),
            "mean_rejected_tokens": float(np.mean([lengths[id][1] for id in chunk])),
            "chosen_longer": _share_above_zero(np.array([lengths[id][0] - lengths[id][1] for id in chunk])),
        }
        for t, chunk in enumerate(chunks, start=1)
    ]


def source_accuracies(
    source: dict[str, str], rulers: dict[str, dict[str, float]]
) -> dict[str, dict[str, dict[str, float]]]:
    """{source: {ruler: {value, low, high, n}}}: shares of pairs above 0 with 95 % intervals.

    `source` is {id: source}; a ruler is {id: value} for some of these ids. The ruler `score` is also given as its
    mean, `score_mean`.
    """
    accuracies: dict[str, dict[str, dict[str, float]]] = {}
    for name in dict.fromkeys(source.values()):
        values = {
            ruler: np.array([value for id, value in by_id.items() if source.get(id) == name])
            for ruler, by_id in rulers.items()
        }
        accuracies[name] = {ruler: wilson(value_N) for ruler, value_N in values.items()}
        accuracies[name]["score_mean"] = _mean(values["score"])
    return accuracies


def order_warnings(accuracies: dict[str, dict[str, dict[str, float]]], name: str, by_mean: bool = False) -> list[str]:
    """Reasons to doubt the order of sources by the accuracy, or mean, of the score called `name`: length alone or
    random weights give the same one, or neighbours cannot be told apart.
    """
    measure, what = ("score_mean", f"mean {name}") if by_mean else ("score", name)

    def order(ruler: str) -> list[str]:
        return sorted(
            accuracies, key=lambda s: (-accuracies[s][ruler]["value"], -accuracies[s]["score_mean"]["value"], s)
        )

    ranked, found = order(measure), []
    if len(ranked) < 2:
        return found
    for other, why in (("shorter", "length alone"), ("random_model", "a randomly initialised model")):
        if order(other) == ranked:
            found.append(f"the order by {what} ({', '.join(ranked)}) is also what {why} gives")
    for easier, harder in pairwise(ranked):
        if accuracies[easier][measure]["low"] <= accuracies[harder][measure]["high"]:
            found.append(f"the intervals of {easier} and {harder} overlap: their order by {what} may be chance")
    return found


def wilson(value_N: np.ndarray) -> dict[str, float]:
    """The share of values above 0, ties counting half, and its 95 % Wilson score interval."""
    n, share = len(value_N), _share_above_zero(value_N)
    middle = (share + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half = Z_95 / (1 + Z_95**2 / n) * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n**2))
    return {"value": share, "low": max(middle - half, 0.0), "high": min(middle + half, 1.0), "n": n}


def _mean(value_N: np.ndarray) -> dict[str, float]:
    """The mean and its 95 % interval."""
    mean, n = float(value_N.mean()), len(value_N)
    half = Z_95 * math.sqrt(float(value_N.var()) / max(n - 1, 1))
    return {"value": mean, "low": mean - half, "high": mean + half, "n": n}


def _share_above_zero(value_N: np.ndarray) -> float:
    return float((1 + np.sign(value_N)).mean() / 2)
