"""Receipts of the chunks that a split made, and reasons to doubt the order of its sources.

Summed log-probs mostly measure length, so the order of sources by difficulty is compared with the orders by length
alone and by a randomly initialised model.

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
from sdpo.model.memory import scoring_budget
from sdpo.model.packing import tokens_of
from sdpo.stats import Measure, as_measure
from sdpo.train.setup import Inputs
from sdpo.types import TokenPair
from sdpo.variants import score as scores
from sdpo.variants.split import Level

NUM_SAMPLED = 200  # pairs of each source that a model scores only for the baselines
BASELINES: dict[str, Callable] = {
    "gamma": scores.gamma,
    "gamma_per_token": scores.gamma_per_token,
    "shorter": scores.length_gap,
}

Accuracies = dict[str, dict[str, Measure]]  # source -> name of a score -> share of its pairs with a score above 0


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
    """The accuracy of each source's kept pairs by several scores: the score that was used (`score`), and baselines.

    The baselines are S's gamma, its gamma per token, "shorter is better", and a randomly initialised model. What needs
    passes of a model that the score did not need is measured on a sample of each source.
    """
    sampled = _sample(inputs.train, kept)
    scored = _scored_by_initial(inputs, used, sampled)
    scores_N = {"score": score_N}
    for name, function in BASELINES.items():
        values_N = score_inputs.scores(inputs, config, function, inputs.initial, inputs.train.take(scored))
        scores_N[name] = _at(scored, values_N, len(inputs.train))
    scores_N["random_model"] = _at(sampled, _random_gamma(inputs, sampled), len(inputs.train))
    return source_accuracies(inputs.train.sources[kept], {name: values_N[kept] for name, values_N in scores_N.items()})


def has_accuracies(inputs: Inputs, used: Score, kept: np.ndarray) -> bool:
    """Whether the store has all that `accuracies` reads."""
    sampled = _sample(inputs.train, kept)
    scored, random_model = inputs.train.take(_scored_by_initial(inputs, used, sampled)), _random_model(inputs, sampled)
    return inputs.runner.has_logprobs(inputs.initial, scored.rows) and inputs.runner.store.holds("score", random_model)


def source_accuracies(source_N: np.ndarray, scores_N: dict[str, np.ndarray]) -> Accuracies:
    """For each source the share of pairs with a score above 0, by each score, with 95 % intervals.

    Scores are [N], nan if a pair has none. The mean of the one called `score` is also given, as `score_mean`.
    """
    found: Accuracies = {}
    for source in dict.fromkeys(source_N):
        values = {name: values_N[source_N == source] for name, values_N in scores_N.items()}
        known = {name: values_N[~np.isnan(values_N)] for name, values_N in values.items()}
        found[source] = {name: as_measure(stats.wilson(values_N)) for name, values_N in known.items()}
        found[source]["score_mean"] = as_measure(stats.student(values["score"]))
    return found


def warnings(split: Split, used: Score, found: Accuracies) -> list[str]:
    """Reasons to doubt the order of the sources, if the split puts them in an order."""
    settings = split.function.keywords
    if settings.get("level") != Level.source:
        return []
    return order_warnings(found, used.name, by_mean=settings["measure"] == "mean")


def order_warnings(found: Accuracies, score_name: str, by_mean: bool = False) -> list[str]:
    """Reasons to doubt the order of sources by the accuracy of a score, or by its mean.

    Length alone or random weights give the same order, or the intervals of neighbours overlap.
    """
    measure, label = ("score_mean", f"mean {score_name}") if by_mean else ("score", score_name)

    def order(name: str) -> list[str]:
        return sorted(found, key=lambda s: (-found[s][name]["value"], -found[s]["score_mean"]["value"], s))

    ranked = order(measure)
    if len(ranked) < 2:
        return []
    baselines = {"shorter": "length alone", "random_model": "a randomly initialised model"}
    doubts = [
        f"the order by {label} ({', '.join(ranked)}) is also the order by {baseline}"
        for name, baseline in baselines.items()
        if order(name) == ranked
    ]
    for easier, harder in pairwise(ranked):
        if found[easier][measure]["low"] <= found[harder][measure]["high"]:
            doubts.append(f"the intervals of {easier} and {harder} overlap: their order by {label} may be chance")
    return doubts


def _scored_by_initial(inputs: Inputs, used: Score, sampled: np.ndarray) -> np.ndarray:
    """The pairs that S scores for the baselines: all of them if S scored them for `used` already, else the sample."""
    return np.arange(len(inputs.train)) if "logps" in inputs_of(used.function) else sampled


def _sample(table: PairTable, kept: np.ndarray) -> np.ndarray:
    """At most NUM_SAMPLED of the kept pairs of each source, as sorted indices; the sample depends on the ids alone."""
    by_source: dict[str, list[int]] = {}
    for i in sorted(kept.tolist(), key=lambda i: hashlib.sha256(table.ids[i].encode()).digest()):
        by_source.setdefault(table.sources[i], []).append(i)
    return np.array(sorted(i for members in by_source.values() for i in members[:NUM_SAMPLED]), dtype=int)


def _at(indices: np.ndarray, values: np.ndarray, num_pairs: int) -> np.ndarray:
    """An array [N] with these values at these indices, and nan at all others."""
    values_N = np.full(num_pairs, np.nan)
    values_N[indices] = values
    return values_N


def _random_model(inputs: Inputs, sampled: np.ndarray) -> dict[str, Any]:
    """The determinants of `_random_gamma`."""
    shape = json.loads((inputs.initial.folder / "config.json").read_text())
    rows = inputs.train.take(sampled).rows
    return {"random_model": shape, "rows": content_hash(rows), **inputs.runner.numerics.of_packs()}


def _random_gamma(inputs: Inputs, sampled: np.ndarray) -> np.ndarray:
    """gamma of the sampled pairs under a model of S's shape with random weights, which can only tell lengths apart."""
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
    return scores.gamma(score(scorer, rows, scoring_budget(launch))).tolist()
