"""What a run starts from: S, its tokenizer, and the pairs as token rows; each made once and kept in the store."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sdpo import lab
from sdpo.binding import choose, needs
from sdpo.config import Config, for_step
from sdpo.data import preferences as preference_data
from sdpo.data.preferences import Pair, Preferences
from sdpo.data.tokenize import TokenPair, encode
from sdpo.launch import local as launch
from sdpo.model import adapters, hub
from sdpo.store import Artifact, Store
from sdpo.train import probes
from sdpo.train.loop import Chunk
from sdpo.train.reference_windows import external
from sdpo.train.runner import Workbench
from sdpo.train.step import take_step
from sdpo.variants import loss as losses
from sdpo.variants.loss import Both


class Inputs(NamedTuple):
    bench: Workbench
    initial: Artifact  # S, which is M_0
    train: list[TokenPair]
    held_out: list[TokenPair]
    pairs: dict[str, Pair]  # by id, both sides
    report: dict  # data_report.json
    exam: lab.Exam | None  # the laboratory's questions

    def chunk(self, ids: list[str]) -> Chunk:
        """The rows and ratings of these training pairs, in this order."""
        rows = {row.id: row for row in self.train}
        chunk = as_chunk([rows[id] for id in ids], self.pairs)
        return chunk._replace(probes=[*self.held_out, *self.probes(ids)])

    def probes(self, ids: list[str]) -> list[TokenPair]:
        """The pairs of a chunk that are followed, in the order of the training rows."""
        members = set(ids)
        return probes.sample([row for row in self.train if row.id in members])


def as_chunk(rows: list[TokenPair], pairs: dict[str, Pair]) -> Chunk:
    ratings = [(pairs[row.id].chosen_rating, pairs[row.id].rejected_rating) for row in rows]
    return Chunk(rows, np.array(ratings, dtype=np.float32))  # None becomes nan


def prepare(config: Config, store: Store, take: Callable = take_step) -> Inputs:
    """Everything a run needs before its first step, S by `take`; raises ValueError for input that cannot be used."""
    if (config.model.name == "lab") != (config.data.name == "lab"):
        raise ValueError("model=lab and data=lab go together: the laboratory's model speaks nothing else")
    base, tokenizer = _base_model(config, store)
    bench = Workbench(config, store, tokenizer)
    if config.data.name == "lab":
        initial = _sft(config, bench, base, take)
        preferences, exam = _lab_pairs(config, bench, initial)
    else:
        initial, exam = base, None
        preferences = preference_data.load(config.data)
    _check_ratings(config, preferences.train)
    if config.tune.get("quantize", "none") != "none":
        initial = adapters.rounded(initial, config, store, tokenizer)
    settings = {k: getattr(config.data, k) for k in ("template", "max_tokens", "on_long")}
    train, train_report = encode(preferences.train, tokenizer, **settings)
    held_out, held_out_report = encode(preferences.held_out, tokenizer, **settings)
    pairs = {pair.id: pair for pair in [*preferences.train, *preferences.held_out]}
    if external_references := _external_references(config):
        kept = [pairs[id] for id in (*train, *held_out)]
        _refuse_truncated(config, train_report, held_out_report)
        for reference in external_references:
            _read_by_external(reference, config, bench, kept)
    report = preferences.report | {"tokens": {"train": train_report, "held_out": held_out_report}}
    return Inputs(bench, initial, list(train.values()), list(held_out.values()), pairs, report, exam)


def _check_ratings(config: Config, pairs: list[Pair]) -> None:
    """ValueError where the loss reads ratings that a training pair lacks, or that it does not accept."""
    loss = choose(losses, config.loss)
    if "ratings" not in needs(loss):
        return
    if unrated := [pair.id for pair in pairs if None in (pair.chosen_rating, pair.rejected_rating)]:
        raise ValueError(
            f"loss={config.loss['name']} needs chosen_rating and rejected_rating, which {len(unrated)} of {len(pairs)} "
            f"training pairs lack, {unrated[0]} among them; choose another loss, or data with ratings"
        )
    ratings = Both(*torch.tensor([(pair.chosen_rating, pair.rejected_rating) for pair in pairs]).T)
    loss(*(ratings for _ in needs(loss)))  # says what it does not accept; of the rest any number will do


def _external_references(config: Config) -> list[dict]:
    """The settings of every external reference, of the run and of single steps, each once."""
    found: list[dict] = []
    for t in (0, *config.steps):
        reference = for_step(config, t).reference
        if reference["name"] == "external" and reference not in found:
            found.append(reference)
    return found


def _refuse_truncated(config: Config, *reports: dict) -> None:
    """ValueError where a pair was cut in our tokens: an external reference reads whole texts in its own."""
    if cut := sum(source["truncated"] for report in reports for source in report["sources"].values()):
        raise ValueError(
            f"{cut} pairs are cut by data.on_long={config.data.on_long}, but reference=external reads whole texts, "
            "so its log-probs would be of other responses; set data.on_long=drop, or raise data.max_tokens"
        )


def _read_by_external(reference: dict, config: Config, bench: Workbench, pairs: list[Pair]) -> None:
    """Let an external reference read the same texts with its own tokenizer and template; only sums cross over."""
    model = external(reference)
    tokenizer = hub.load_tokenizer(model.folder)
    longest = max(tokenizer.model_max_length, config.data.max_tokens)
    template = reference.get("template")
    bench.foreign[model.key], _ = encode(pairs, tokenizer, template=template, max_tokens=longest, on_long="error")


def _base_model(config: Config, store: Store):
    """The model before any training here, with its tokenizer."""
    if config.model.name != "lab":
        remote = config.model.trust_remote_code
        folder = hub.locate(config.model.path, config.model.revision, config.model.name == "hub", remote)
        key = hub.fingerprint(folder)
        return Artifact(key, folder, reused=True), hub.load_tokenizer(folder, remote)
    tokenizer = lab.tokenizer()

    def build(folder: Path) -> None:
        if launch.is_main():
            model = lab.new_model(config.model.lab, config.model.seed)
            hub.save(model, model.state_dict(), tokenizer, folder)

    determinants = {"lab": asdict(config.model.lab), "seed": config.model.seed}
    return store.make("model", determinants, build), tokenizer


def _sft(config: Config, bench: Workbench, base: Artifact, take: Callable) -> Artifact:
    """S, as step 0 of the ordinary loop: supervised fine-tuning on the laboratory's demonstrations."""
    rows = lab.demonstrations(config.data.lab, config.model.seed)
    unrated = np.full((len(rows), 2), np.nan, dtype=np.float32)
    settings = replace(
        config,
        optim=config.model.sft,
        loss={"name": "sft"},
        reference={"name": "none"},
        tune={"name": "full"},
        seed=config.model.seed,
    )
    return take(bench, settings, 0, base, [base], Chunk(rows, unrated)).model


def _lab_pairs(config: Config, bench: Workbench, initial: Artifact) -> tuple[Preferences, lab.Exam]:
    """The laboratory's pairs and questions, both partly made of S's own answers, and so kept under S's key."""

    def build(folder: Path) -> None:
        if launch.is_main():
            preferences, exam = lab.build(config.data, bench.host_model(initial), bench.tokenizer)
            preference_data.write_jsonl(folder / "train.jsonl", preferences.train)
            preference_data.write_jsonl(folder / "held_out.jsonl", preferences.held_out)
            kept = {"report": preferences.report, "exam": asdict(exam)}
            (folder / "rest.json").write_text(json.dumps(kept))

    settings = asdict(config.data.lab) | {"seed": config.data.seed}
    folder = bench.store.make("pairs", {"initial": initial.key, "settings": settings}, build).folder
    rest = json.loads((folder / "rest.json").read_text())
    train, held_out = (preference_data.read_jsonl(folder / f"{name}.jsonl") for name in ("train", "held_out"))
    return Preferences(train, held_out, rest["report"]), lab.Exam(**rest["exam"])
