"""How easy each source is by several rulers, and whether its place in an order can be believed."""

import hashlib
import json

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sdpo.binding import needs
from sdpo.config import Config
from sdpo.curriculum import diagnostics
from sdpo.curriculum.chunking import Score, Split
from sdpo.curriculum.score_inputs import scored
from sdpo.data.tokenize import TokenPair, content_hash
from sdpo.model import hub
from sdpo.model.logprobs import Scorer, score
from sdpo.train.setup import Inputs
from sdpo.variants import score as scores
from sdpo.variants.split import Level

NUM_SAMPLED = 200  # pairs of a source that a model is asked about for its accuracy alone
RULERS = {"gamma": scores.gamma, "gamma_per_token": scores.gamma_per_token, "shorter": scores.length_gap}


def accuracies(
    inputs: Inputs, config: Config, used: Score, by_id: dict[str, float], kept: list[str]
) -> dict[str, dict]:
    """Per source the accuracy, with its interval, of the pairs that are kept: by the score that was used, by S's
    gamma, by gamma per token, by "shorter is better" and by a randomly initialised model.

    What needs a model that the score did not run is measured on a sample of each source.
    """
    source = {id: inputs.pairs[id].source for id in kept}
    sample = _sample(inputs, source)
    rows = inputs.train if "logps" in needs(used.function) else sample
    rulers = {"score": by_id} | {
        name: scored(inputs, config, ruler, inputs.initial, rows) for name, ruler in RULERS.items()
    }
    rulers["random_model"] = _random_gamma(inputs, sample)
    return diagnostics.source_accuracies(source, rulers)


def warnings(split: Split, used: Score, accuracies: dict[str, dict]) -> list[str]:
    """Reasons to doubt the order of the sources, where the split puts them in one."""
    settings = split.function.keywords
    if settings.get("level") != Level.source:
        return []
    return diagnostics.order_warnings(accuracies, used.name, by_mean=settings["measure"] == "mean")


def _sample(inputs: Inputs, source: dict[str, str]) -> list[TokenPair]:
    """At most NUM_SAMPLED pairs of each source, which depend on the ids alone."""
    ids: dict[str, list[str]] = {}
    for id in sorted(source, key=lambda id: hashlib.sha256(id.encode()).digest()):
        ids.setdefault(source[id], []).append(id)
    sampled = {id for members in ids.values() for id in members[:NUM_SAMPLED]}
    return [row for row in inputs.train if row.id in sampled]


def _random_gamma(inputs: Inputs, rows: list[TokenPair]) -> dict[str, float]:
    """gamma by id under a model of S's shape with random weights: what an untrained network makes of lengths."""
    bench, folder = inputs.bench, inputs.initial.folder
    remote = bench.config.model.trust_remote_code
    determinants = {
        "random_model": json.loads((folder / "config.json").read_text()),
        "rows": content_hash(rows),
        "precision": bench.config.precision,
        "device": bench.device.type,
        "attention": bench.config.launch.attention,
    }

    def compute() -> list[float]:
        bench.release()
        shape = AutoConfig.from_pretrained(folder, trust_remote_code=remote)
        dtype = hub.DTYPES[bench.config.precision]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(shape, dtype=dtype, trust_remote_code=remote)
        scorer = Scorer(model.eval().to(bench.device), bench.config.launch.attention)
        return scores.gamma(score(scorer, rows, bench.config.launch.tokens_per_pack)).tolist()

    gamma = bench.store.make_json("score", determinants, compute)
    return dict(zip((row.id for row in rows), gamma, strict=True))
