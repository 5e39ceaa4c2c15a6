"""One sDPO step as an artifact: named by everything that determines it, trained only where it does not exist."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sdpo.binding import choose, needs
from sdpo.config import Config
from sdpo.data.tokenize import TokenPair, content_hash
from sdpo.launch import local as launch
from sdpo.metrics import tell
from sdpo.model.checkpoint import Checkpoint, load_moments, save_moments
from sdpo.store import Artifact, check, key_of
from sdpo.train import throughput
from sdpo.train.loop import Chunk, Fit, Span, updates
from sdpo.train.probes import Probes
from sdpo.train.reference_logprobs import MovingReference, StandIn, hash_of_weights
from sdpo.train.reference_windows import Windows, resolve
from sdpo.train.runner import Workbench, read_table, write_table
from sdpo.train.throughput import Pace, Speed
from sdpo.variants import loss as losses
from sdpo.variants import placebo


class Named(NamedTuple):
    """A step before it is taken: the key of M_t, and what determines it."""

    key: str
    determinants: dict
    windows: Windows


class Step(NamedTuple):
    """What a step was made of and what it made; `reference` is its first window's model, None where none is read."""

    model: Artifact
    start: Artifact
    reference: Artifact | None
    windows: list[dict]
    chunk: Chunk
    reference_N2: np.ndarray  # the log-probs that the loss read, each pair's last ones
    entries: list[dict]  # one per update
    speed: Speed


def name_step(
    bench: Workbench,
    config: Config,
    t: int,
    start: Artifact,
    history: list[Artifact],
    chunk: Chunk,
    span: Span | None = None,
) -> Named:
    """The name of M_t, for which nothing is trained or scored; start and history need not exist yet.

    `config` has this step's overrides in it; `history` is M_0 .. M_{t-1}; `span` is None where the schedule is the
    step's own.
    """
    windows = Windows([], None)
    if "reference" in needs(choose(losses, config.loss)):
        num_updates = len(updates(len(chunk.rows), config.optim, config.seed))
        windows = resolve(config, t, num_updates, start, history, bench.store, bench.tokenizer)
        if not windows.listed:
            raise ValueError(f"loss={config.loss['name']} reads a reference, which reference=none does not give")
    determinants = _determinants(bench, config, start, windows, chunk, history[0])
    if span:
        determinants["span"] = span
    return Named(key_of("step", determinants), determinants, windows)


def take_step(
    bench: Workbench,
    config: Config,
    t: int,
    start: Artifact,
    history: list[Artifact],
    chunk: Chunk,
    span: Span | None = None,
) -> Step:
    """M_t as name_step names it: found in the store, or trained from `start` on the chunk against its windows."""
    key, determinants, windows = name_step(bench, config, t, start, history, chunk, span)
    _tell_what_is_ignored(config, t, windows)

    def build(folder: Path) -> None:
        checkpoint = Checkpoint(bench.store.folder("partial", key), f"step {t}", config.launch.checkpoint_minutes)
        scored_before = bench.scored.copy()
        reference, start_N2 = _anchor(bench, config, start, windows, chunk, history[0])
        engine = bench.hold(start, config)
        if config.optim.moments == "carry" and (start.folder / "moments-0.safetensors").is_file():
            load_moments(engine, start.folder)
        num_weights = throughput.multiplied(start, engine.scorer.model)
        fit = Fit(engine, chunk, choose(losses, config.loss), config, span)
        entries = fit.run(reference, start_N2, checkpoint)
        if config.optim.moments == "carry":
            save_moments(engine, folder)
        bench.save(folder, key)
        if launch.is_main():
            write_table(folder / "reference.parquet", chunk.rows, reference.logps_N2)
            reference.probes.write(folder / "probes.parquet", chunk.rows, fit.plan)
            trained = Pace(*(sum(entry[name] for entry in entries) for name in ("tokens", "seconds")))
            speed = throughput.speed(config, num_weights, trained, Pace(*(bench.scored - scored_before).tolist()))
            log = {"entries": entries, "windows": reference.report, "speed": speed._asdict()}
            (folder / "train.json").write_text(json.dumps(log))
        checkpoint.clear()

    model = bench.store.make("step", determinants, build)
    check(model, "train.json", "reference.parquet")
    log = json.loads((model.folder / "train.json").read_text())
    reference_N2 = read_table(model.folder / "reference.parquet")
    listed = [listed | seen for listed, seen in zip(windows.listed, log["windows"], strict=True)]
    speed = Speed(**log["speed"])
    return Step(model, start, windows.first, listed, chunk, reference_N2, log["entries"], speed)


def _tell_what_is_ignored(config: Config, t: int, windows: Windows) -> None:
    rule = config.reference["name"]
    if not windows.listed and rule != "none":
        tell(f"step {t}: loss={config.loss['name']} reads no reference, so reference={rule} is left out")
    if len(windows.listed) == 1 and "updates" in config.reference:
        tell(f"step {t} has no more updates than reference.updates, so its reference stays where it is")


def _determinants(
    bench: Workbench, config: Config, start: Artifact, windows: Windows, chunk: Chunk, initial: Artifact
) -> dict:
    """Everything that M_t depends on, and nothing else: the rule by its resolved windows, not by its name."""
    loss = choose(losses, config.loss)
    determinants = {
        "start": start.key,
        "windows": windows.listed,
        "rows": content_hash(chunk.rows),
        "loss": {"name": config.loss["name"], **loss.keywords},
        "tune": config.tune,
        "optim": asdict(config.optim),
        "precision": config.precision,
        "save_dtype": config.save_dtype,
        "seed": config.seed,
        "ranks": config.launch.ranks,
        "threads": config.launch.threads,
        "attention": config.launch.attention,
        "compile": config.launch.compile,
        "deepspeed": asdict(config.deepspeed),
        "device": bench.device.type,
    }
    if "ratings" in needs(loss):
        determinants["ratings"] = repr(chunk.ratings_N2.tolist())
    if windows.listed and config.reference["placebo"] != "none":
        determinants["placebo"] = {"name": config.reference["placebo"], "initial": initial.key}
    if chunk.probes and (config.probe.every or len(windows.listed) > 1):  # what is looked at inside is kept inside
        determinants["probe"] = {"every": config.probe.every, "rows": content_hash(chunk.probes)}
    return determinants


def _anchor(
    bench: Workbench, config: Config, start: Artifact, windows: Windows, chunk: Chunk, initial: Artifact
) -> tuple[MovingReference, np.ndarray]:
    """What the loss will read, scored before the step trains (by the very weights in memory where they are the
    start's), and the start's own log-probs of the rows of the first update."""
    rows, model, weights_hash = chunk.rows, windows.first, None
    reference_N2 = np.zeros((len(rows), 2), dtype=np.float32)  # read by nobody where there is no reference
    if model is not None:
        reference_N2 = bench.logprobs(model, rows)
        bench.audit(model, rows, reference_N2)
        weights_hash = hash_of_weights(bench.hold(model))
    start_N2 = reference_N2
    if model is None or model.key != start.key:
        first = updates(len(rows), config.optim, config.seed)[0]
        start_N2 = np.full_like(reference_N2, np.nan)
        start_N2[first] = bench.logprobs(start, [rows[i] for i in first])
    probes = Probes(chunk.probes, config.probe.every)
    stand_in = _placebo(bench, config, rows, initial) if model is not None else None
    return MovingReference(windows.listed, reference_N2, weights_hash, probes, stand_in), start_N2


def _placebo(bench: Workbench, config: Config, rows: list[TokenPair], initial: Artifact) -> StandIn | None:
    """What takes the place of a window's log-probs; None where they are read as they are."""
    if config.reference["placebo"] == "none":
        return None
    transform, initial_N2 = choose(placebo, {"name": config.reference["placebo"]}), bench.logprobs(initial, rows)
    return lambda members, rule_N2: transform(initial_N2[members], rule_N2, config.seed)
