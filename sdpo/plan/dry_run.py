"""The steps of a run and their keys, computed before the run: nothing is trained, written or downloaded.

The plan follows the run's own loop with a read-only view of the store. If the pairs of a chunk do not exist yet, are
not on this machine, or are not scored yet, placeholders stand for them.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sdpo import config as configuration
from sdpo.binding import inputs_of
from sdpo.config import Config
from sdpo.curriculum import chunking, crossfit
from sdpo.curriculum.build import build, why_unknown
from sdpo.curriculum.rounds import KIND, Round
from sdpo.data import readers
from sdpo.data.tokenize import content_hash
from sdpo.model import hub
from sdpo.model.packing import tokens_of
from sdpo.plan import placeholders
from sdpo.plan.flops import flops_of_step
from sdpo.stepwise import whole_run
from sdpo.store.artifacts import Artifact, ReadOnly, key_of
from sdpo.train import setup
from sdpo.train.runner import Runner
from sdpo.train.setup import Inputs
from sdpo.train.step import name_step
from sdpo.train.step_key import StepSpec
from sdpo.types import Chunk


class Planned(NamedTuple):
    """A step, its key and its cost."""

    model: Artifact  # M_t; if `unknown` is set, its key will be another one
    t: int
    num_pairs: int
    tokens: int  # that pass through the network in one epoch
    flops: float  # nan if the size of the model is unknown
    seconds: float | None  # that its updates took; None if the step does not exist
    unknown: str | None  # the reason if its pairs are placeholders


class Prepared(NamedTuple):
    """What several runs share: their inputs, the step that trains S if there is one, and why pairs are placeholders."""

    inputs: Inputs
    steps: list[Planned]
    unknown: str | None


def prepare(config: Config, store: ReadOnly) -> Prepared:
    """The inputs of a run, with placeholders for pairs that do not exist."""
    if missing := _missing_from_hub(config):
        where = {"path": config.model.path, "revision": config.model.revision}
        initial = Artifact(key_of("external", where), Path(config.model.path or ""), reused=False)
        inputs = placeholders.inputs_for(config, store, initial)
        return Prepared(inputs, [], f"{missing} is not on this machine")
    steps: dict[str, Planned] = {}

    def take(spec: StepSpec, runner: Runner) -> Planned:
        planned = plan_step(spec, runner)
        return steps.setdefault(planned.model.key, planned)

    if config.data.name == "lab":
        runner, initial = setup.open_runner(config, store)
        if config.model.name == "lab":
            initial = setup.fine_tune(config, runner, initial, take)
        if not store.holds("pairs", setup.lab_pairs_key(config, initial)):
            inputs = placeholders.inputs_for(config, store, initial)
            return Prepared(inputs, list(steps.values()), "the laboratory's pairs are not made yet")
    return Prepared(setup.prepare(config, store, take), list(steps.values()), None)


def plan_scoring_models(config: Config, prepared: Prepared) -> list[Planned]:
    """The models that are trained only to score the pairs; empty if the score needs none."""
    split, inputs = chunking.bind_split(config.split), prepared.inputs
    score = chunking.bind_score(config.score, split).function
    if not (split.needs_scores and "margins" in inputs_of(score)):
        return []
    halves = crossfit.halves(inputs, config, **score.keywords)
    return [plan_step(half.spec, inputs.runner, prepared.unknown) for half in halves]


def plan_steps(config: Config, prepared: Prepared) -> list[Planned]:
    """M_1 .. M_T."""
    inputs = prepared.inputs
    history = [inputs.initial]
    rescores = chunking.bind_split(config.split).needs_scores and config.score.get("model") == "current"
    waits = rescores or config.rounds.name != "given"  # whether a chunk depends on the model before it
    chunks: Iterator[tuple[Chunk, str | None]] = _chunks(config, prepared, history)
    known = [] if waits else list(chunks)
    spans = whole_run([len(chunk.rows) for chunk, _ in known], not waits, config)
    planned = []
    for t, (chunk, unknown) in enumerate(known or chunks, start=1):
        here = configuration.for_step(config, t)
        start = history[-1] if here.start == "previous" else history[0]
        spec = StepSpec(t, here, start, list(history), chunk, spans.get(t))
        planned.append(plan_step(spec, inputs.runner, unknown))
        history.append(planned[-1].model)
    return planned


def plan_step(spec: StepSpec, runner: Runner, unknown: str | None = None) -> Planned:
    """The step that `take_step` would take, with the same key, but not trained."""
    external = bool(unknown) and spec.config.reference["name"] == "external"
    if external:  # the reference may not be on this machine; the placeholders' prompt ids stand for it in the key
        initial = {"name": "initial", "placebo": "none"}
        key, _, windows = name_step(replace(spec, config=replace(spec.config, reference=initial)), runner)
        windows = windows._replace(first=None)
    else:
        key, _, windows = name_step(spec, runner)
    model = Artifact(key, runner.store.folder("step", key), reused=runner.store.has("step", key))
    tokens = sum(map(tokens_of, spec.chunk.rows))
    flops = flops_of_step(spec, windows)
    return Planned(model, spec.t, len(spec.chunk.rows), tokens, flops, _seconds(model), unknown)


def _missing_from_hub(config: Config) -> str | None:
    """A model or data set of the Hub that the run needs and that is not on this machine; None if all are."""
    models = [(config.model.path, config.model.revision)] if config.model.name == "hub" else []
    models += [(one["path"], one.get("revision")) for one in setup.external_references(config)]
    missing = [path for path, revision in models if path and not hub.is_here(path, revision)]
    missing += [name for name in readers.on_hub(config.data) if not readers.is_here(name, config.data.revisions)]
    return missing[0] if missing else None


def _missing_judge(config: Config) -> str | None:
    """The reward model of on-policy rounds if it is not on this machine; its weights are part of their key."""
    path = config.rounds.path if config.rounds.judge == "reward_model" else None
    return path if path and not hub.is_here(path, config.rounds.revision) else None


def _chunks(config: Config, prepared: Prepared, history: list[Artifact]) -> Iterator[tuple[Chunk, str | None]]:
    """Each step's chunk, and the reason if its pairs are placeholders. The caller appends each M_t to `history`."""
    inputs, unknown = prepared.inputs, prepared.unknown
    if not chunking.bind_split(config.split).needs_scores:
        for indices in build(inputs, config, inputs.initial).chunks:
            yield _in_round(inputs, config, indices, history[-1], unknown)
        return
    unknown = unknown or why_unknown(inputs, config, inputs.initial)
    curriculum = None if unknown else build(inputs, config, inputs.initial)
    for t, guess in enumerate(placeholders.order(inputs, config)):
        if curriculum and not unknown:
            unknown = curriculum.why_unknown(t, history[-1])
        if curriculum and not unknown:
            yield _in_round(inputs, config, curriculum.indices(t, history[-1]), history[-1], None)
        else:
            yield placeholders.ordered(inputs.chunk(guess), inputs, config, history[-1]), unknown


def _in_round(
    inputs: Inputs, config: Config, indices: np.ndarray, newest: Artifact, unknown: str | None
) -> tuple[Chunk, str | None]:
    """These pairs as the chunk of a step, or the answers that `newest` gave or will give to their prompts."""
    if config.rounds.name == "given":
        return inputs.chunk(indices), unknown
    if missing := _missing_judge(config):
        pairs = inputs.chunk(indices)
        about = {"rounds": asdict(config.rounds), "seed": config.seed, "model": newest.key}
        return placeholders.mark(pairs, prompts=content_hash(pairs.rows), **about), f"{missing} is not on this machine"
    on_policy = Round(inputs, config, indices, newest)
    if inputs.runner.store.has(KIND, on_policy.key):
        return on_policy.chunk(), unknown
    return placeholders.mark(inputs.chunk(indices), round=on_policy.key), "the newest model has not answered yet"


def _seconds(model: Artifact) -> float | None:
    if not model.reused:
        return None
    log = json.loads((model.folder / "train.json").read_text())
    return sum(entry["seconds"] for entry in log["entries"])
