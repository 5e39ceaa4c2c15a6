"""One sDPO step as an artifact: found by its key, or trained and stored."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sdpo import distributed
from sdpo.console import tell
from sdpo.errors import UserError
from sdpo.model.checkpoint import Checkpoint, load_moments, save_moments
from sdpo.model.engine import Engine
from sdpo.store import Artifact, check, key_of
from sdpo.train import logprob_table, throughput
from sdpo.train.loop import TrainingLoop
from sdpo.train.reference_logprobs import ReferenceLogprobs, score_first_window
from sdpo.train.reference_windows import Windows, resolve
from sdpo.train.runner import Runner
from sdpo.train.step_key import StepSpec, determinants
from sdpo.train.throughput import Pace, Speed

Record = Callable[[dict], None]  # takes the log entry of one update


class Named(NamedTuple):
    """A step before it is taken: the key of M_t, and what decides it."""

    key: str
    determinants: dict
    windows: Windows


class Step(NamedTuple):
    """What a step was made of and what it made."""

    spec: StepSpec
    model: Artifact
    reference: Artifact | None  # the first window's model; None if the loss reads no reference
    windows: list[dict]
    reference_N2: np.ndarray  # the reference log-probs that the loss read last for each pair
    entries: list[dict]  # one per update
    speed: Speed


def name_step(spec: StepSpec, runner: Runner) -> Named:
    """The key that M_t has or will have; nothing is trained or scored."""
    windows = resolve(spec, runner) if spec.reads_reference else Windows([], None)
    if spec.reads_reference and not windows.listed:
        raise UserError(f"loss={spec.config.loss['name']} reads a reference, which reference=none does not give")
    decided = determinants(spec, windows.listed)
    return Named(key_of("step", decided), decided, windows)


def take_step(spec: StepSpec, runner: Runner, record: Record = lambda entry: None) -> Step:
    """Make M_t, or find it in the store; `record` takes the log entry of every update, as soon as it is known."""
    key, decided, windows = name_step(spec, runner)
    _tell_what_is_ignored(spec, windows)
    model = runner.store.make("step", decided, lambda folder: _train(spec, key, windows, runner, folder, record))
    check(model, "train.json", "reference.parquet")
    log = json.loads((model.folder / "train.json").read_text())
    if model.reused:
        for entry in log["entries"]:
            record(entry)
    reference_N2 = logprob_table.read(model.folder / "reference.parquet")
    listed = [window | seen for window, seen in zip(windows.listed, log["windows"], strict=True)]
    return Step(spec, model, windows.first, listed, reference_N2, log["entries"], Speed(**log["speed"]))


def _train(spec: StepSpec, key: str, windows: Windows, runner: Runner, folder: Path, record: Record) -> None:
    """Train the step from its start, or from its last checkpoint, and write the artifact's files into `folder`."""
    config, chunk = spec.config, spec.chunk
    checkpoint = Checkpoint(runner.store.folder("partial", key), f"step {spec.t}", config.launch.checkpoint_minutes)
    scored_before = runner.scored.copy()
    engine, reference, start_N2 = _prepare(spec, windows, runner)
    num_weights = throughput.multiplied(spec.start, engine.scorer.model)
    entries = []
    for entry in TrainingLoop(spec, engine).run(reference, start_N2, checkpoint):
        entries.append(entry)
        record(entry)
    if config.optim.moments == "carry":
        save_moments(engine, folder)
    runner.save(folder, key)
    if distributed.is_main():
        logprob_table.write(folder / "reference.parquet", chunk.rows, reference.logps_N2)
        reference.probes.write(folder / "probes.parquet", chunk.rows, spec.plan)
        trained = Pace(*(sum(entry[name] for entry in entries) for name in ("tokens", "seconds")))
        speed = throughput.speed(config, num_weights, trained, Pace(*(runner.scored - scored_before).tolist()))
        log = {"entries": entries, "windows": reference.report, "speed": speed._asdict()}
        (folder / "train.json").write_text(json.dumps(log))
    checkpoint.clear()


def _prepare(spec: StepSpec, windows: Windows, runner: Runner) -> tuple[Engine, ReferenceLogprobs, np.ndarray]:
    """The engine that trains, the first window's log-probs, and the start's own log-probs of the first update.

    The engine that trains also scores what the start has to score, so that the start is loaded once. An engine with an
    adapter does not: tables hold the log-probs of merged weights.
    """
    whole, engine = spec.config.tune["name"] == "full", None
    is_start = windows.first is not None and windows.first.key == spec.start.key
    if whole and (is_start or windows.first is None):
        engine = runner.load_to_train(spec)
    reference = score_first_window(spec, windows, runner)
    if whole and engine is None:
        engine = runner.load_to_train(spec)
    start_N2 = _score_start(spec, is_start, runner)
    engine = engine or runner.load_to_train(spec)
    if spec.config.optim.moments == "carry" and (spec.start.folder / "moments-0.safetensors").is_file():
        load_moments(engine, spec.start.folder)
    return engine, reference, start_N2


def _score_start(spec: StepSpec, is_reference: bool, runner: Runner) -> np.ndarray:
    """The start's log-probs [N, 2] of the whole chunk if it is the reference, else of the first update alone."""
    rows = spec.chunk.rows
    if is_reference:
        return runner.logprobs(spec.start, rows)
    start_N2 = np.full((len(rows), 2), np.nan, dtype=np.float32)
    start_N2[spec.plan[0]] = runner.logprobs(spec.start, [rows[i] for i in spec.plan[0]])
    return start_N2


def _tell_what_is_ignored(spec: StepSpec, windows: Windows) -> None:
    rule, loss = spec.config.reference, spec.config.loss["name"]
    if not windows.listed and rule["name"] != "none":
        tell(f"step {spec.t}: loss={loss} reads no reference, so reference={rule['name']} is left out")
    if len(windows.listed) == 1 and "updates" in rule:
        tell(f"step {spec.t} has no more updates than reference.updates, so its reference stays where it is")
