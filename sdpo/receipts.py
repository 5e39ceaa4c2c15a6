"""What a split did, in numbers: what is in each chunk, and whether an order by difficulty is one by length.

Shape suffixes: N pairs.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from sdpo.splits import Chunks, Row

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
    sources: Sequence[str],
    chosen_logp_N: np.ndarray,
    rejected_logp_N: np.ndarray,
    chosen_tokens_N: np.ndarray,
    rejected_tokens_N: np.ndarray,
    random_gamma_N: np.ndarray | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """{source: {measure: {value, low, high, n}}}, the shares of pairs ranked right, with 95 % intervals.

    Measures are `gamma`, `gamma_per_token`, `shorter` (the shorter response is taken for the better one) and,
    where given, `random_model` (gamma under random weights of the same shape).
    """
    measures = {
        "gamma": chosen_logp_N - rejected_logp_N,
        "gamma_per_token": chosen_logp_N / chosen_tokens_N - rejected_logp_N / rejected_tokens_N,
        "shorter": rejected_tokens_N - chosen_tokens_N,
    }
    if random_gamma_N is not None:
        measures["random_model"] = random_gamma_N
    source_N = np.array(sources)
    return {
        source: {name: wilson(value_N[source_N == source]) for name, value_N in measures.items()}
        for source in dict.fromkeys(sources)
    }


def order_warnings(accuracies: dict[str, dict[str, dict[str, float]]], measure: str = "gamma") -> list[str]:
    """Reasons to doubt an order of sources by `measure`: length alone or random weights give the same one, or
    neighbours cannot be told apart.
    """

    def order(name: str) -> list[str]:
        return sorted(accuracies, key=lambda source: (-accuracies[source][name]["value"], source))

    ranked, found = order(measure), []
    if len(ranked) < 2:
        return found
    for other, why in (("shorter", "length alone"), ("random_model", "a randomly initialised model")):
        if other in accuracies[ranked[0]] and order(other) == ranked:
            found.append(f"the order by {measure} ({', '.join(ranked)}) is also what {why} gives")
    for easier, harder in zip(ranked, ranked[1:], strict=False):
        if accuracies[easier][measure]["low"] <= accuracies[harder][measure]["high"]:
            found.append(
                f"the intervals of {easier} and {harder} overlap: their order by {measure} may be chance"
            )
    return found


def wilson(value_N: np.ndarray) -> dict[str, float]:
    """The share of values above 0, ties counting half, and its 95 % Wilson score interval."""
    n, share = len(value_N), _share_above_zero(value_N)
    middle = (share + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half = Z_95 / (1 + Z_95**2 / n) * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n**2))
    return {"value": share, "low": max(middle - half, 0.0), "high": min(middle + half, 1.0), "n": n}


def _share_above_zero(value_N: np.ndarray) -> float:
    return float((1 + np.sign(value_N)).mean() / 2)
