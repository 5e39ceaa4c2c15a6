"""What a run starts from: S, its tokenizer, and the pairs as tokens. Each is made once and kept in the store."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from sdpo import distributed
from sdpo.binding import bind, inputs_of
from sdpo.config import Config, Settings, for_step
from sdpo.console import tell
from sdpo.data import preferences as preference_files
from sdpo.data.pair_table import PairTable
from sdpo.data.preferences import Pair, Preferences
from sdpo.data.tokenize import content_hash, encode
from sdpo.errors import UserError
from sdpo.lab import exam as lab_exam
from sdpo.lab import model as lab_model
from sdpo.lab import pairs as lab_pairs
from sdpo.model import hub, limits
from sdpo.model.lora import adapters
from sdpo.model.sampling import named_stops
from sdpo.store.artifacts import Artifact, Store
from sdpo.train import probes
from sdpo.train.reference_windows import external
from sdpo.train.runner import Runner
from sdpo.train.step import take_step
from sdpo.train.step_key import StepSpec
from sdpo.types import ChosenRejected, Chunk, TokenPair
from sdpo.variants import loss as losses

TakeStep = Callable[[StepSpec, Runner], Any]  # returns what has the trained model as `.model`


@dataclass(frozen=True)
class Inputs:
    """What a run starts from."""

    runner: Runner
    initial: Artifact  # S, which is M_0
    train: PairTable
    held_out: PairTable
    report: dict  # data_report.json
    exam: lab_exam.Exam | None  # the laboratory's questions
    held_out_sets: dict[str, PairTable] = field(default_factory=dict)  # measured apart, by name

    def chunk(self, indices: np.ndarray) -> Chunk:
        """These training pairs as the chunk of a step, in the order of the indices."""
        table, probes = self.train.take(indices), self.probes(indices)
        positions = [int(np.flatnonzero(indices == i)[0]) for i in probes]
        followed = [*self.held_out.rows, *self.train.take(probes).rows]
        return Chunk(table.rows, table.ratings_N2, followed, positions)

    def probes(self, indices: np.ndarray) -> np.ndarray:
        """The pairs of a chunk that are followed through the run, in the order of the training pairs."""
        return probes.sample(self.train.ids, indices, self.runner.config.probe.num_pairs)

    def followed(self, chunks: list[np.ndarray]) -> list[list[TokenPair]]:
        """The tables of rows that every model scores: held-out pairs, further sets of them, the chunks' probes."""
        probed = [self.train.take(self.probes(indices)) for indices in chunks]
        return [table.rows for table in (self.held_out, *self.held_out_sets.values(), *probed)]


def prepare(config: Config, store: Store, take: TakeStep = take_step) -> Inputs:
    """Everything that a run needs before its first step. `take` trains S, if S is trained here.

    Raises UserError if the data or the model cannot be used.
    """
    if (config.model.name == "lab") != (config.data.name == "lab"):
        raise UserError("model=lab and data=lab go together: the laboratory's model knows no other language")
    runner, base = open_runner(config, store)
    initial, exam = base, None
    if config.data.name == "lab":
        initial = fine_tune(config, runner, base, take)
        preferences, exam = _lab_pairs(config, runner, initial)
    else:
        preferences = preference_files.load(config.data)
    _check_ratings(config, preferences.train)
    (train, held_out, *more), report = _encode(config, runner, preferences)
    if base.key in runner.foreign:
        raise UserError(f"reference.path={config.model.path} is S itself: use reference=initial")
    if config.model.name != "lab":
        _check_readable(config, runner, base, (train, held_out, *more))
    if config.tune.get("quantize", "none") != "none":
        initial = adapters.rounded(initial, runner.loading, store, runner.tokenizer)
    sets = dict(zip(preferences.held_out_sets, more, strict=True))
    return Inputs(runner, initial, train, held_out, report, exam, sets)


def _check_readable(config: Config, runner: Runner, base: Artifact, tables: Sequence[PairTable]) -> None:
    """Raise UserError, which names the row or the file, for pairs or prompts of probe.file that S cannot read."""
    rows = [row for table in tables for row in table.rows]
    called = {pair.id: pair.called for table in tables for pair in table.pairs}
    limits.check_rows(rows, base.folder, config.model.trust_remote_code, called)
    model = AutoConfig.from_pretrained(base.folder, trust_remote_code=config.model.trust_remote_code)
    probes.Sampler(config, runner).check(model)


def open_runner(config: Config, store: Store) -> tuple[Runner, Artifact]:
    """A runner with the model's tokenizer, and the model before any training here."""
    base, tokenizer = _base_model(config, store)
    return Runner(config, store, tokenizer, named_stops(base.folder)), base


def _encode(config: Config, runner: Runner, preferences: Preferences) -> tuple[list[PairTable], dict]:
    """The training pairs, the held-out pairs and each further set of them as tokens, and the data report."""
    sides = {"train": preferences.train, "held_out": preferences.held_out}
    sides |= {f"held_out_sets.{name}": pairs for name, pairs in preferences.held_out_sets.items()}
    for file in preferences.report.get("files", ()):  # the laboratory has none
        if file["dropped"]:
            reasons = ", ".join(f"{number} {reason}" for reason, number in file["dropped"].items())
            tell(f"{file['file']}: not all {file['rows']} rows are used ({reasons}); data_report.json names the rest")
        if file["unread_columns"]:
            names = ", ".join(file["unread_columns"])
            tell(f"{file['file']}: columns that are not read: {names} (data.columns names those that are)")
    tables, reports = [], {}
    for side, pairs in sides.items():
        called = {"train": "training", "held_out": "held-out"}.get(side, side)
        rows, reports[side] = encode(pairs, runner.tokenizer, config.data, called)
        for note in reports[side]["notes"]:
            tell(f"{side}: {note}")
        tables.append(PairTable.join(pairs, rows))
    for reference in external_references(config):
        _refuse_truncated(config, *reports.values())
        _encode_for_external(reference, config, runner, [pair for table in tables for pair in table.pairs])
    return tables, preferences.report | {"tokens": reports}


def _check_ratings(config: Config, pairs: list[Pair]) -> None:
    """Raise UserError if a loss reads ratings, and a training pair has none or has some that the loss refuses."""
    if config.rounds.name == "on_policy" and config.rounds.share == 1:
        return  # the ratings of answers are their rewards
    for settings in [for_step(config, t).loss for t in (0, *config.steps)]:
        loss = bind(losses, settings)
        if "ratings" not in inputs_of(loss):
            continue
        if unrated := [pair.id for pair in pairs if None in (pair.chosen_rating, pair.rejected_rating)]:
            raise UserError(
                f"loss={settings['name']} needs chosen_rating and rejected_rating, which {len(unrated)} of "
                f"{len(pairs)} training pairs lack, {unrated[0]} among them; choose another loss, or data with ratings"
            )
        ratings = ChosenRejected(*torch.tensor([(pair.chosen_rating, pair.rejected_rating) for pair in pairs]).T)
        loss(*(ratings for _ in inputs_of(loss)))  # raises for ratings that it refuses; other inputs can be any number


def external_references(config: Config) -> list[Settings]:
    """The settings of every external reference, of the run and of single steps, without duplicates."""
    found: list[Settings] = []
    for t in (0, *config.steps):
        reference = for_step(config, t).reference
        if reference["name"] == "external" and reference not in found:
            found.append(reference)
    return found


def _refuse_truncated(config: Config, *reports: dict) -> None:
    """Raise UserError if our tokenizer truncated a pair, because an external reference reads whole texts."""
    if truncated := sum(source["truncated"] for report in reports for source in report["sources"].values()):
        raise UserError(
            f"{truncated} pairs are truncated by data.on_long={config.data.on_long}, but reference=external reads "
            "whole texts, so its log-probs would be of other responses; set data.on_long=drop, or raise data.max_tokens"
        )


def _encode_for_external(reference: Settings, config: Config, runner: Runner, pairs: list[Pair]) -> None:
    """Encode the same texts with an external reference's own tokenizer and template; only sums are compared.

    Raises UserError if it cannot read a pair, and if another step reads it with another template.
    """
    model, named = external(reference), f"reference.path={reference['path']}"
    tokenizer = hub.load_tokenizer(model.folder)
    longest = max(tokenizer.model_max_length, config.data.max_tokens)
    theirs = replace(config.data, template=reference.get("template"), max_tokens=longest)
    try:
        rows, _ = encode(
            pairs, tokenizer, replace(theirs, on_long="error", on_bad_row="error"), limit="its model_max_length"
        )
    except UserError as error:
        raise UserError(f"{named} cannot read every pair: {error}") from error
    if lost := [pair.id for pair in pairs if pair.id not in rows]:
        raise UserError(f"{named}: the responses of pair {lost[0]} are the same tokens there; remove the pair")
    limits.check_rows(rows.values(), model.folder)
    if content_hash(rows.values()) != content_hash(runner.foreign.get(model.key, rows).values()):
        raise UserError(f"{named} is read with two templates; give it the same reference.template in every step")
    runner.foreign[model.key] = rows


def _base_model(config: Config, store: Store) -> tuple[Artifact, PreTrainedTokenizerBase]:
    """The model that the configuration names, and its tokenizer. The laboratory's is built with random weights."""
    if config.model.name != "lab":
        remote = config.model.trust_remote_code
        folder = hub.locate(config.model.path, config.model.revision, config.model.name == "hub", remote)
        return Artifact(hub.fingerprint(folder), folder, reused=True), hub.load_tokenizer(folder, remote)
    tokenizer = lab_model.tokenizer()

    def build(folder: Path) -> None:
        if distributed.is_main():
            model = lab_model.new_model(config.model.lab, config.model.seed)
            hub.save(model, model.state_dict(), tokenizer, folder)

    determinants = {"lab": asdict(config.model.lab), "seed": config.model.seed}
    return store.make("model", determinants, build), tokenizer


def fine_tune(config: Config, runner: Runner, base: Artifact, take: TakeStep) -> Artifact:
    """S of the laboratory: step 0 of the ordinary loop, supervised fine-tuning on demonstrations."""
    assert config.model.sft is not None
    rows = lab_pairs.demonstrations(config.data.lab, config.model.seed)
    training = replace(
        config,
        split={},
        optim=config.model.sft,
        loss={"name": "sft"},
        reference={"name": "none"},
        tune={"name": "full"},
        seed=config.model.seed,
    )
    unrated_N2 = np.full((len(rows), 2), np.nan, dtype=np.float32)
    return take(StepSpec(0, training, base, [base], Chunk(rows, unrated_N2)), runner).model


def lab_pairs_key(config: Config, initial: Artifact) -> dict[str, Any]:
    """What the laboratory's pairs depend on: the settings, and S, because some of the pairs are answers of S."""
    return {"initial": initial.key, "settings": asdict(config.data.lab) | {"seed": config.data.seed}}


def _lab_pairs(config: Config, runner: Runner, initial: Artifact) -> tuple[Preferences, lab_exam.Exam]:
    """The laboratory's pairs and questions: from the store, or made."""

    def build(folder: Path) -> None:
        if distributed.is_main():
            model = runner.load_verified(initial)
            preferences = lab_pairs.preferences(config.data, model, runner.tokenizer)
            exam = lab_exam.set_exam(config.data.lab, model, runner.tokenizer)
            preference_files.write_jsonl(folder / "train.jsonl", preferences.train)
            preference_files.write_jsonl(folder / "held_out.jsonl", preferences.held_out)
            rest = {"report": preferences.report, "exam": asdict(exam)}
            (folder / "rest.json").write_text(json.dumps(rest))

    folder = runner.store.make("pairs", lab_pairs_key(config, initial), build).folder
    rest = json.loads((folder / "rest.json").read_text())
    train, held_out = (preference_files.read_jsonl(folder / f"{name}.jsonl") for name in ("train", "held_out"))
    return Preferences(train, held_out, rest["report"]), lab_exam.Exam(**rest["exam"])
