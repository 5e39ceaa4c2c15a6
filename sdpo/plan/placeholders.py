"""Placeholders for pairs that do not exist yet or are not on this machine, so that a plan can count steps and tokens.

Their number and approximate length come from the settings. Their prompt ids repeat one hash, so two planned steps share
a key exactly when the real ones will.
"""

from dataclasses import asdict
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sdpo.config import Config, Data
from sdpo.curriculum import chunking
from sdpo.curriculum.chunking import split_rows
from sdpo.data import preferences, readers
from sdpo.data.pair_table import PairTable
from sdpo.data.preferences import Pair
from sdpo.errors import UserError
from sdpo.store.artifacts import Artifact, Store, key_of
from sdpo.train.runner import Runner
from sdpo.train.setup import Inputs
from sdpo.types import Chunk, TokenPair

LAB_TOKENS = 20  # of a laboratory pair: a prompt of 7 tokens and two answers of about as many
CHARACTERS = 4  # per token, approximately


def inputs_for(config: Config, store: Store, initial: Artifact) -> Inputs:
    """Inputs as large as the run's will be; `initial` need not exist. Raises UserError if their size is unknown."""
    sized, token = _pairs_with_tokens(config), np.zeros(1, dtype=np.int32)
    rows = [TokenPair(pair.id, np.broadcast_to(token, tokens), token, token) for pair, tokens in sized]
    other = config.reference if config.reference["name"] == "external" else None
    rows = _mark(rows, data=asdict(config.data), initial=initial.key, reference=other)
    table = PairTable([pair for pair, _ in sized], rows)
    runner = Runner(config, store, PreTrainedTokenizerBase())  # a tokenizer without vocabulary: a plan encodes nothing
    return Inputs(runner, initial, table, PairTable([], []), {}, None)


def order(inputs: Inputs, config: Config) -> list[np.ndarray]:
    """The chunks that the split would make if the order of the pairs were the order of their scores."""
    split, rows = chunking.bind_split(config.split), split_rows(inputs.train)
    chunks = chunking.divide(split, rows, {row.id: -float(i) for i, row in enumerate(rows)}, config.seed)
    return [inputs.train.indices(ids) for ids in chunks]


def ordered(chunk: Chunk, inputs: Inputs, config: Config, newest: Artifact) -> Chunk:
    """The chunk, marked with the score, split and model that decide its pairs; unmarked if it holds all pairs."""
    in_order = config.split.get("within") == "score"
    if len(chunk.rows) == len(inputs.train) and not in_order:
        return chunk
    settings = config.split if in_order else {**config.split, "name": None}  # hard_to_easy reverses easy_to_hard
    model = newest.key if config.score.get("model") == "current" else inputs.initial.key
    return mark(chunk, score=config.score, split=settings, model=model)


def mark(chunk: Chunk, **about: Any) -> Chunk:
    """The chunk with rows that stand for what `about` describes."""
    return chunk._replace(rows=_mark(chunk.rows, **about))


def _mark(rows: list[TokenPair], **about: Any) -> list[TokenPair]:
    """The rows with every prompt id replaced by a hash of `about`, which describes what the rows stand for."""
    number = np.int32(int(key_of("stand-in", about)[:7], 16))
    return [row._replace(prompt=np.broadcast_to(number, len(row.prompt))) for row in rows]


def _pairs_with_tokens(config: Config) -> list[tuple[Pair, int]]:
    """The training pairs, each with its approximate number of tokens."""
    if config.data.name == "lab":
        lab = config.data.lab.sources
        return [pair for name, source in lab.items() for pair in _invented(name, source.num_pairs, LAB_TOKENS)]
    if all(readers.is_here(name, config.data.revisions) for name in readers.on_hub(config.data)):
        return [(pair, 1 + _length(pair) // CHARACTERS) for pair in preferences.load(config.data).train]
    sources = dict.fromkeys(readers.sources(config.data, config.data.train))
    if missing := sources.keys() - config.data.nominal.keys():
        sizes = ", ".join(f"{source}: {{pairs: 60000, tokens: 700}}" for source in sources if source in missing)
        raise UserError(
            f"{', '.join(sorted(missing))}: not on this machine; give the plan the sizes, in tokens per pair, as in "
            f"'+data.nominal={{{sizes}}}'"
        )
    return [pair for source in sources for pair in _nominal(source, config.data)]


def _nominal(source: str, settings: Data) -> list[tuple[Pair, int]]:
    """As many training pairs as data.nominal says that a source has, less the held-out share."""
    size = settings.nominal[source]
    held_out = 0 if settings.held_out else settings.held_out_share
    return _invented(source, round(size.pairs * (1 - held_out)), size.tokens)


def _invented(source: str, num_pairs: int, tokens: int) -> list[tuple[Pair, int]]:
    ids = [f"{source}-{i}" for i in range(num_pairs)]
    return [(Pair(id, source, ({"role": "user", "content": id},), "", ""), tokens) for id in ids]


def _length(pair: Pair) -> int:
    return sum(len(turn["content"]) for turn in pair.prompt) + len(pair.chosen) + len(pair.rejected)
