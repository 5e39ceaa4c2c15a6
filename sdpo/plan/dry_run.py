"""The steps of a run before it runs, by the names that they will have: nothing is made, trained or downloaded.

A run is prepared and its loop is walked as if it ran, in a read-only view of the store. Where chunks cannot be known,
because the pairs do not exist, are not on this machine or are not scored, stand-ins take their places.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sdpo import config
from sdpo.binding import needs
from sdpo.config import Config
from sdpo.curriculum import chunking, crossfit
from sdpo.curriculum.build import in_order
from sdpo.curriculum.score_inputs import rows_of
from sdpo.data.readers import Unreachable
from sdpo.model.packing import tokens_of
from sdpo.plan import placeholders
from sdpo.stepwise import whole_run
from sdpo.store import Artifact, NotYet, ReadOnly, key_of
from sdpo.train import throughput
from sdpo.train.loop import Chunk, Span
from sdpo.train.runner import Workbench
from sdpo.train.setup import Inputs, prepare
from sdpo.train.step import name_step


class Planned(NamedTuple):
    """A step by its name, with what it costs or has cost."""

    model: Artifact  # M_t; where `unknown`, of another key than it will have
    t: int
    num_pairs: int
    tokens: int  # that pass through the network once an epoch
    flops: float  # nan where the model's size is unknown
    seconds: float | None  # that its updates took; None where it does not exist
    unknown: str | None  # why its pairs are stand-ins, where they are


class Prepared(NamedTuple):
    """What several runs start from: their inputs, the step that makes S where one does, and why pairs are stand-ins."""

    inputs: Inputs
    steps: list[Planned]
    unknown: str | None


def prepare_by_name(settings: Config, store: ReadOnly) -> Prepared:
    """The inputs of a run, with stand-ins for what is not there."""
    steps: list[Planned] = []

    def take(*step) -> Planned:
        steps.append(by_name(*step))
        return steps[-1]

    try:
        return Prepared(prepare(settings, store, take), steps, None)
    except NotYet:
        unknown = "the laboratory's pairs are not made yet"
    except Unreachable as missing:
        unknown = f"{missing.name} is not on this machine"
    initial = steps[-1].model if steps else _elsewhere(settings)
    return Prepared(placeholders.inputs_for(settings, store, initial), steps, unknown)


def for_scores(settings: Config, prepared: Prepared) -> list[Planned]:
    """The models that the pairs are scored with, where scores want some trained for them."""
    inputs, score = prepared.inputs, chunking.bind_score(settings.score, chunking.bind(settings.split)).function
    if not (_needs_scores(settings) and "margins" in needs(score)):
        return []
    training, halves = crossfit.trainings(settings, rows_of(inputs), **score.keywords)
    history = [inputs.initial]
    return [
        by_name(inputs.bench, training, 1, inputs.initial, history, inputs.chunk(trained), unknown=prepared.unknown)
        for _, trained, _ in halves
    ]


def steps(settings: Config, prepared: Prepared) -> list[Planned]:
    """M_1 .. M_T."""
    inputs, planned = prepared.inputs, []
    history = [inputs.initial]
    order = _chunks(settings, prepared, history)
    if _needs_scores(settings) and settings.score.get("model") == "current":  # a chunk needs the model before it
        spans = whole_run(order, settings)
    else:
        order = list(order)
        spans = whole_run([chunk.rows for chunk, _ in order], settings)
    for t, (chunk, unknown) in enumerate(order, start=1):
        here = config.for_step(settings, t)
        start = history[-1] if here.start == "previous" else history[0]
        planned.append(by_name(inputs.bench, here, t, start, history, chunk, spans.get(t), unknown))
        history.append(planned[-1].model)
    return planned


def by_name(
    bench: Workbench,
    settings: Config,
    t: int,
    start: Artifact,
    history: list[Artifact],
    chunk: Chunk,
    span: Span | None = None,
    unknown: str | None = None,
) -> Planned:
    """A step as `take_step` would take it, by name alone."""
    named = settings
    if unknown and settings.reference["name"] == "external":  # it need not be here: its stand-ins tell it apart
        named = replace(settings, reference={"name": "initial", "placebo": "none"})
    key, _, windows = name_step(bench, named, t, start, history, chunk, span)
    if named is not settings:
        windows = windows._replace(first=None)
    model = Artifact(key, bench.store.folder("step", key), reused=bench.store.has("step", key))
    tokens = sum(map(tokens_of, chunk.rows))
    flops = throughput.of_step(settings, chunk, windows, history[0])
    return Planned(model, t, len(chunk.rows), tokens, flops, _seconds(model), unknown)


def _chunks(settings: Config, prepared: Prepared, history: list[Artifact]) -> Iterator[tuple[Chunk, str | None]]:
    """Each step's chunk, and why its pairs are stand-ins where they are."""
    inputs, unknown, num_known = prepared.inputs, prepared.unknown, 0
    if not (unknown and _needs_scores(settings)):  # stand-ins have no scores
        try:
            for ids in in_order(inputs, settings, history):
                yield inputs.chunk(ids), unknown
                num_known += 1
            return
        except NotYet:
            unknown = "the pairs are not scored yet"
        except Unreachable as missing:
            unknown = f"{missing.name} is not on this machine"
    for ids in placeholders.order(inputs, settings)[num_known:]:
        yield placeholders.ordered(inputs.chunk(ids), inputs, settings, history[-1]), unknown


def _needs_scores(settings: Config) -> bool:
    return chunking.bind(settings.split).needs_scores


def _elsewhere(settings: Config) -> Artifact:
    """A model of the Hub that is not on this machine."""
    where = {"path": settings.model.path, "revision": settings.model.revision}
    return Artifact(key_of("external", where), Path(settings.model.path), reused=False)


def _seconds(model: Artifact) -> float | None:
    if not model.reused:
        return None
    log = json.loads((model.folder / "train.json").read_text())
    return sum(entry["seconds"] for entry in log["entries"])
