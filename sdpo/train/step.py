"""One sDPO step as an artifact: found by its key, or trained and stored."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sdpo import distributed
from sdpo.console import tell
from sdpo.data.tokenize import content_hash
from sdpo.errors import UserError
from sdpo.metrics import CLOCK
from sdpo.model.checkpoints.checkpoint import Checkpoint, load_moments, save_moments
from sdpo.model.engine import Engine
from sdpo.store.artifacts import Artifact, Store, check, key_of
from sdpo.train import logprob_table, step_key, throughput
from sdpo.train.loop import TrainingLoop
from sdpo.train.probes import Sampler
from sdpo.train.reference_logprobs import ReferenceLogprobs, bind_placebo, score_first_window
from sdpo.train.reference_windows import Windows, resolve, taken
from sdpo.train.runner import Runner
from sdpo.train.step_key import StepSpec
from sdpo.train.throughput import Pace, Speed

MOST_RANKS = 1024  # launch.any_ranks looks for steps made by 1 to this many ranks
ANY = "any"  # stands for the number of ranks in the key of a step that another number of ranks may resume
Record = Callable[[dict], None]  # takes the log entry of one update


class NamedStep(NamedTuple):
    """What is known of a step before it is trained: the key of M_t, what decides the key, and the windows."""

    key: str
    determinants: dict
    windows: Windows


class Step(NamedTuple):
    """A step that was trained or found in the store: what went into it and what came out."""

    spec: StepSpec
    model: Artifact
    reference: Artifact | None  # the first window's model; None if the loss reads no reference
    windows: list[dict]
    reference_N2: np.ndarray  # for each pair the reference log-probs that the loss read last
    entries: list[dict]  # one per update
    speed: Speed


def name_step(spec: StepSpec, runner: Runner) -> NamedStep:
    """The key that M_t has or will have; nothing is trained or scored."""
    windows = resolve(spec, runner) if spec.reads_reference else Windows([], None)
    if spec.reads_reference and not windows.listed:
        raise UserError(f"loss={spec.config.loss['name']} reads a reference, which reference=none does not give")
    if spec.reads_divergence:
        _check_stays(spec, windows)
    determinants = step_key.determinants(spec, windows.listed)
    if windows.first and windows.first.key in runner.foreign:  # its tokens depend on its template
        determinants["reference_rows"] = content_hash(runner.as_read_by(windows.first, spec.chunk.rows))
    if spec.config.launch.any_ranks:
        determinants = distributed.broadcast(_as_found(determinants, runner.store))
    return NamedStep(key_of("step", determinants), determinants, windows)


def _as_found(determinants: dict, store: Store) -> dict:
    """The determinants under which the store has this step: with this run's ranks, ANY, 1, 2, ...; else ANY."""
    own = determinants | {"ranks": ANY}
    all_ways = chain([determinants, own], _by_each_number(determinants))
    return next((made for made in all_ways if store.holds("step", made)), own)


def _by_each_number(determinants: dict) -> Iterator[dict]:
    """The determinants of this step for each number of ranks."""
    return (determinants | {"ranks": ranks} for ranks in range(1, MOST_RANKS + 1))


def take_step(spec: StepSpec, runner: Runner, record: Record = lambda entry: None, in_background: bool = False) -> Step:
    """Train M_t, or find it in the store. `record` gets the log entry of every update, as soon as it is known.

    It is called once per update, in the order of updates, also if the step is resumed or found. With `in_background`,
    the folder of M_t may not be whole before `runner.store.join()`.
    """
    named = name_step(spec, runner)
    if (ranks := named.determinants["ranks"]) not in (ANY, spec.config.launch.ranks):
        what = f"step {spec.t}" if spec.t else "S"
        tell(f"{what} is taken from the store as {ranks} ranks made it (launch.any_ranks)")
    _tell_ignored_settings(spec, named.windows)
    others = _by_each_number(named.determinants) if ranks == ANY else ()
    other_keys = (key_of("step", other) for other in others)
    minutes = spec.config.launch.checkpoint_minutes
    checkpoint = Checkpoint(runner.store, named.key, f"step {spec.t}", minutes, other_keys)
    trained: list[Outcome] = []

    with ExitStack() as until_stored:

        def build(folder: Path) -> None:
            until_stored.enter_context(distributed.stops_deferred())  # not while it waits for another run's step
            trained.append(_train(spec, named, runner, folder, checkpoint, record))

        # The checkpoint is not cleared before: a step that is killed while it is hashed goes on from there.
        model = runner.store.make("step", named.determinants, build, then=checkpoint.clear)
        if not in_background:
            runner.store.join()
        if trained and any(distributed.gather(distributed.stop_requested())):
            runner.store.join()
            raise SystemExit(distributed.STOPPED)
    if not trained:
        checkpoint.clear()
        trained.append(_read(model))
        _keep_asked_samples(trained[0].log["entries"], spec, runner)
        for entry in trained[0].log["entries"]:
            record(entry)
    log, reference_N2 = trained[0]
    windows = taken(named.windows.listed, log["windows"], len(spec.plan))
    return Step(spec, model, named.windows.first, windows, reference_N2, log["entries"], Speed(**log["speed"]))


class Outcome(NamedTuple):
    """What a trained step leaves besides its model."""

    log: dict  # train.json
    reference_N2: np.ndarray  # for each pair the reference log-probs that the loss read last


def _check_stays(spec: StepSpec, windows: Windows) -> None:
    """Raise UserError unless one model is the reference of the whole step, whose distribution can be read."""
    if len(windows.listed) > 1 or "bound" in windows.listed[0]:
        raise UserError(
            f"loss={spec.config.loss['name']} reads the reference's whole distribution, and "
            f"reference={spec.config.reference['name']} moves inside the step: use reference=previous or initial"
        )


def _keep_asked_samples(entries: list[dict], spec: StepSpec, runner: Runner) -> None:
    """Remove answers to prompts that this run does not ask while it trains; say so if it lacks those."""
    asked, every = Sampler(spec.config, runner).questions, spec.config.probe.answers_every
    for entry in entries:
        if kept := [answer for answer in entry.pop("samples", ()) if answer["prompt"] in asked]:
            entry["samples"] = kept
    if asked and len(entries) >= every and not any("samples" in entry for entry in entries):
        tell(f"step {spec.t} was trained before, without these prompts of probe.file: it has no answers to them")


def _read(model: Artifact) -> Outcome:
    check(model, "train.json", "reference.parquet")
    log = json.loads((model.folder / "train.json").read_text())
    return Outcome(log, logprob_table.read(model.folder / "reference.parquet"))


def _train(
    spec: StepSpec, named: NamedStep, runner: Runner, folder: Path, checkpoint: Checkpoint, record: Record
) -> Outcome:
    """Train the step from its start, or from its last checkpoint, and write the artifact's files into `folder`."""
    config, chunk = spec.config, spec.chunk
    scored_before = runner.scored.copy()
    engine, reference, start_N2 = _prepare(spec, named.windows, runner)
    num_weights = throughput.multiplied(engine.scorer.model)
    beside = runner.load_beside(named.windows.first) if spec.reads_divergence and named.windows.first else None
    loop, entries = TrainingLoop(spec, engine, num_weights, Sampler(config, runner), beside), []
    with CLOCK.counting("updates"):
        for entry in loop.run(reference, start_N2, checkpoint):
            entries.append(entry)
            record(entry)
    runner.store.join()  # at most one step is completed in the background
    if config.optim.moments == "carry":
        save_moments(engine, folder)
    runner.save(engine, folder, named.key)
    trained = Pace(*(sum(entry[name] for entry in entries) for name in ("tokens", "seconds")))
    speed = throughput.speed(config, num_weights, trained, Pace(*(runner.scored - scored_before).tolist()))
    log = {"entries": entries, "windows": reference.report, "speed": speed._asdict()}
    log |= {"ranks": loop.ranks} if len(loop.ranks) > 1 else {}
    if distributed.is_main():
        logprob_table.write(folder / "reference.parquet", chunk.rows, reference.logps_N2)
        reference.probes.write(folder / "probes.parquet", chunk.rows, spec.plan)
        (folder / "train.json").write_text(json.dumps(log))
    return Outcome(log, reference.logps_N2)


def _prepare(spec: StepSpec, windows: Windows, runner: Runner) -> tuple[Engine, ReferenceLogprobs, np.ndarray]:
    """The engine that trains, the first window's log-probs, and the start's own log-probs of the first update.

    Only one model is in memory, so the engine that trains is loaded last, or else only the start is scored after it.
    """
    placebo = bind_placebo(spec, runner)
    starts_at_reference = windows.first is not None and windows.first.key == spec.start.key

    def score_reference() -> ReferenceLogprobs:
        return score_first_window(spec, windows, placebo, runner)

    def score_start() -> np.ndarray:
        return _score_start(spec, starts_at_reference, runner)

    if spec.config.tune["name"] != "full":  # an engine with an adapter cannot score: tables are of merged weights
        reference, start_N2, engine = score_reference(), score_start(), runner.load_to_train(spec)
    elif starts_at_reference or windows.first is None:
        engine, reference, start_N2 = runner.load_to_train(spec), score_reference(), score_start()
    else:
        reference, engine, start_N2 = score_reference(), runner.load_to_train(spec), score_start()
    if spec.config.optim.moments == "carry" and spec.start.is_stored:
        runner.store.join()  # the moments are in the start's folder
        if (spec.start.folder / "moments-0.safetensors").is_file():
            load_moments(engine, spec.start.folder)
    return engine, reference, start_N2


def _score_start(spec: StepSpec, is_reference: bool, runner: Runner) -> np.ndarray:
    """The start's log-probs [N, 2]: of the whole chunk if the start is the reference, else of the first update only."""
    rows = spec.chunk.rows
    if is_reference:
        return runner.logprobs(spec.start, rows)
    start_N2 = np.full((len(rows), 2), np.nan, dtype=np.float32)
    start_N2[spec.plan[0]] = runner.logprobs(spec.start, [rows[i] for i in spec.plan[0]])
    return start_N2


def _tell_ignored_settings(spec: StepSpec, windows: Windows) -> None:
    rule, loss = spec.config.reference, spec.config.loss["name"]
    if not windows.listed and rule["name"] != "none":
        tell(f"step {spec.t}: loss={loss} reads no reference, so reference={rule['name']} is ignored")
    if len(windows.listed) == 1 and "updates" in rule:
        tell(f"step {spec.t} has no more updates than reference.updates, so its reference does not move")
