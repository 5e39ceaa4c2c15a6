"""What a split did, in numbers, and whether its order can be believed.

Summed log-probs mostly measure length, so the order of sources by difficulty is compared with the orders that length
alone and a randomly initialised model give.

Shape suffixes: N pairs.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sdpo import stats
from sdpo.binding import inputs_of
from sdpo.config import Config
from sdpo.curriculum import score_inputs
from sdpo.curriculum.chunking import Score, Split
from sdpo.data.pair_table import PairTable
from sdpo.data.tokenize import content_hash
from sdpo.model import hub
from sdpo.model.logprobs import Scorer, score
from sdpo.model.packing import tokens_of
from sdpo.stats import Measure, as_measure
from sdpo.train.setup import Inputs
from sdpo.types import TokenPair
from sdpo.variants import score as scores
from sdpo.variants.split import Level

NUM_SAMPLED = 200  # pairs of each source that a model scores for its accuracy alone
BASELINES: dict[str, Callable] = {
    "gamma": scores.gamma,
    "gamma_per_token": scores.gamma_per_token,
    "shorter": scores.length_gap,
}

Accuracies = dict[str, dict[str, Measure]]  # source -> ruler -> share of pairs above 0


def chunk_receipts(chunks: Sequence[np.ndarray], table: PairTable, score_N: np.ndarray | None) -> list[dict]:
    """One record per chunk (indices of pairs): its pairs, sources, mean score and mean lengths."""
    receipts = []
    for t, indices in enumerate(chunks, start=1):
        chunk = table.take(indices)
        receipts.append(
            {
                "chunk": t,
                "num_pairs": len(chunk),
                "hash": hashlib.sha256("\n".join(chunk.ids).encode()).hexdigest(),
                "sources": dict(Counter(chunk.sources)),
                "mean_score": None if score_N is None else float(score_N[indices].mean()),
                "mean_tokens": float(np.mean([tokens_of(row) for row in chunk.rows])),
                "mean_chosen_tokens": float(chunk.lengths_N2[:, 0].mean()),
                "mean_rejected_tokens": float(chunk.lengths_N2[:, 1].mean()),
                "chosen_longer": float(stats.share_above(chunk.lengths_N2[:, 0] - chunk.lengths_N2[:, 1]).mean()),
            }
        )
    return receipts


def accuracies(inputs: Inputs, config: Config, used: Score, score_N: np.ndarray, kept: np.ndarray) -> Accuracies:
    """Per source the accuracy of the pairs that are kept: by the score that was used, by S's gamma, by gamma per
    token, by "shorter is better", and by a randomly initialised model.

    What needs a model that the score did not run is measured on a sample of each source.
    """
    sampled = _sample(inputs.train, kept)
    asked = _asked(inputs, used, sampled)
    rulers = {"score": score_N}
    for name, ruler in BASELINES.items():
        values_N = score_inputs.scores(inputs, config, ruler, inputs.initial, inputs.train.take(asked))
        rulers[name] = _spread(values_N, asked, len(inputs.train))
    rulers["random_model"] = _spread(_random_gamma(inputs, sampled), sampled, len(inputs.train))
    return source_accuracies(inputs.train.sources[kept], {name: ruler_N[kept] for name, ruler_N in rulers.items()})


def has_accuracies(inputs: Inputs, used: Score, kept: np.ndarray) -> bool:
    """Whether the store has all that `accuracies` reads."""
    sampled = _sample(inputs.train, kept)
    asked, random_model = inputs.train.take(_asked(inputs, used, sampled)), _random_model(inputs, sampled)
    return inputs.runner.has_logprobs(inputs.initial, asked.rows) and inputs.runner.store.holds("score", random_model)


def source_accuracies(source_N: np.ndarray, rulers: dict[str, np.ndarray]) -> Accuracies:
    """{source: {ruler: share of pairs above 0}} with 95 % intervals; the ruler `score` is also given as its mean.

    A ruler is [N], nan where it was not measured.
    """
    found: Accuracies = {}
    for source in dict.fromkeys(source_N):
        values = {name: ruler_N[source_N == source] for name, ruler_N in rulers.items()}
        known = {name: value_N[~np.isnan(value_N)] for name, value_N in values.items()}
        found[source] = {name: as_measure(stats.wilson(value_N)) for name, value_N in known.items()}
        found[source]["score_mean"] = as_measure(stats.student(values["score"]))
    return found


def warnings(split: Split, used: Score, found: Accuracies) -> list[str]:
    """Reasons to doubt the order of the sources, if the split puts them in an order."""
    settings = split.function.keywords
    if settings.get("level") != Level.source:
        return []
    return order_warnings(found, used.name, by_mean=settings["measure"] == "mean")


def order_warnings(found: Accuracies, name: str, by_mean: bool = False) -> list[str]:
    """Reasons to doubt the order of sources by the accuracy, or mean, of the score called `name`: length alone or
    random weights give the same order, or neighbours cannot be told apart.
    """
    measure, what = ("score_mean", f"mean {name}") if by_mean else ("score", name)

    def order(ruler: str) -> list[str]:
        return sorted(found, key=lambda s: (-found[s][ruler]["value"], -found[s]["score_mean"]["value"], s))

    ranked, doubts = order(measure), []
    if len(ranked) < 2:
        return doubts
    for other, why in (("shorter", "length alone"), ("random_model", "a randomly initialised model")):
        if order(other) == ranked:
            doubts.append(f"the order by {what} ({', '.join(ranked)}) is also what {why} gives")
    for easier, harder in pairwise(ranked):
        if found[easier][measure]["low"] <= found[harder][measure]["high"]:
            doubts.append(f"the intervals of {easier} and {harder} overlap: their order by {what} may be chance")
    return doubts


def _asked(inputs: Inputs, used: Score, sampled: np.ndarray) -> np.ndarray:
    """The pairs that S scores: all if the score that was used had S score them, else the sample."""
    return np.arange(len(inputs.train)) if "logps" in inputs_of(used.function) else sampled


def _sample(table: PairTable, kept: np.ndarray) -> np.ndarray:
    """At most NUM_SAMPLED of the kept pairs of each source, in order; the sample depends on the ids alone."""
    by_source: dict[str, list[int]] = {}
    for i in sorted(kept.tolist(), key=lambda i: hashlib.sha256(table.ids[i].encode()).digest()):
        by_source.setdefault(table.sources[i], []).append(i)
    return np.array(sorted(i for members in by_source.values() for i in members[:NUM_SAMPLED]), dtype=int)


def _spread(values_N: np.ndarray, indices: np.ndarray, num_pairs: int) -> np.ndarray:
    """Values at these indices, and nan at all others."""
    spread_N = np.full(num_pairs, np.nan)
    spread_N[indices] = values_N
    return spread_N


def _random_model(inputs: Inputs, sampled: np.ndarray) -> dict[str, Any]:
    """What the gamma of a randomly initialised model depends on."""
    shape = json.loads((inputs.initial.folder / "config.json").read_text())
    rows = inputs.train.take(sampled).rows
    return {"random_model": shape, "rows": content_hash(rows), **inputs.runner.numerics.of_packs()}


def _random_gamma(inputs: Inputs, sampled: np.ndarray) -> np.ndarray:
    """gamma [N] under a model of S's shape with random weights: what an untrained network makes of lengths."""
    compute = partial(_score_with_random_weights, inputs, inputs.train.take(sampled).rows)
    return np.array(inputs.runner.store.make_json("score", _random_model(inputs, sampled), compute))


def _score_with_random_weights(inputs: Inputs, rows: list[TokenPair]) -> list[float]:
    runner = inputs.runner
    runner.release()
    remote, launch = runner.config.model.trust_remote_code, runner.config.launch
    shape = AutoConfig.from_pretrained(inputs.initial.folder, trust_remote_code=remote)
    dtype = hub.DTYPES[runner.config.precision]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype, trust_remote_code=remote)
    scorer = Scorer(model.eval().to(runner.device), launch.attention)
    return scores.gamma(score(scorer, rows, launch.tokens_per_pack)).tolist()
