"""One sDPO step as an artifact: named by everything that determines it, trained only where it does not exist."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sdpo import launch, losses, references
from sdpo.checkpoint import Checkpoint
from sdpo.config import Config, choose, needs
from sdpo.fit import Chunk, Fit, updates
from sdpo.store import Artifact, key_of
from sdpo.tokens import content_hash
from sdpo.workbench import Workbench


class Step(NamedTuple):
    """What a step was made of and what it made; `reference` is None where the loss reads none."""

    model: Artifact
    start: Artifact
    reference: Artifact | None
    windows: list[dict]
    chunk: Chunk
    entries: list[dict]  # one per update


def take_step(bench: Workbench, config: Config, t: int, start: Artifact, history: list[Artifact], chunk: Chunk) -> Step:
    """M_t: found in the store, or trained from `start` on the chunk against the reference rule's windows.

    `config` has this step's overrides in it; `history` is M_0 .. M_{t-1}.
    """
    loss = choose(losses, config.loss)
    windows, reference = _resolve(config, t, start, history, len(updates(len(chunk.rows), config.optim, 0)))
    if "reference" in needs(loss) and reference is None:
        raise ValueError(f"loss={config.loss['name']} reads a reference, which reference=none does not give")
    determinants = {
        "start": start.key,
        "windows": windows,
        "rows": content_hash(chunk.rows),
        "ratings": key_of("ratings", {"values": repr(chunk.ratings_N2.tolist())}) if "ratings" in needs(loss) else None,
        "loss": {"name": config.loss["name"], **loss.keywords},
        "tune": config.tune,
        "optim": asdict(config.optim),
        "precision": config.precision,
        "save_dtype": config.save_dtype,
        "seed": config.seed,
        "ranks": launch.world_size(),
        "threads": config.launch.threads,
        "deepspeed": asdict(config.deepspeed),
        "device": bench.device.type,
    }
    key = key_of("step", determinants)

    def build(folder: Path) -> None:
        partial = bench.store.folder("partial", key)
        checkpoint = Checkpoint(partial, f"step {t}", config.launch.checkpoint_minutes)
        entries = _train(bench, config, start, reference, chunk, checkpoint)
        bench.save(folder, key)
        if launch.is_main():
            (folder / "train.json").write_text(json.dumps(entries))
        checkpoint.clear()

    model = bench.store.make("step", determinants, build)
    entries = json.loads((model.folder / "train.json").read_text())
    return Step(model, start, reference, windows, chunk, entries)


def _resolve(config: Config, t: int, start: Artifact, history: list[Artifact], num_updates: int):
    """The rule's windows with artifacts' keys for handles, and the first window's model."""
    settings = {name: value for name, value in config.reference.items() if name != "placebo"}
    rule = choose(references, settings)
    handles = {f"M_{i}": model for i, model in enumerate(history)} | {"policy": start}
    windows, first = [], None
    for window in rule(t, num_updates):
        weights: dict[str, float] = {}
        for handle, coefficient in window.weights.items():
            key = handles[handle].key
            weights[key] = weights.get(key, 0.0) + coefficient
        windows.append({"num_updates": window.num_updates, "weights": weights})
        first = first or next(model for model in handles.values() if model.key in weights)
    return windows, first


def _train(
    bench: Workbench,
    config: Config,
    start: Artifact,
    reference: Artifact | None,
    chunk: Chunk,
    checkpoint: Checkpoint,
) -> list[dict]:
    """Reference log-probs first, by the very weights in memory where they are the start's; then the updates."""
    loss = choose(losses, config.loss)
    if reference is None:
        reference_N2 = np.full((len(chunk.rows), 2), np.nan, dtype=np.float32)
    else:
        reference_N2 = bench.logprobs(reference, chunk.rows)
        bench.audit(reference, chunk.rows, reference_N2)
    start_N2 = reference_N2
    if reference is None or reference.key != start.key:
        first = updates(len(chunk.rows), config.optim, config.seed)[0]
        start_N2 = np.full_like(reference_N2, np.nan)
        start_N2[first] = bench.logprobs(start, [chunk.rows[i] for i in first])
    engine = bench.hold(start, config)
    return Fit(engine, chunk, loss, config).run(reference_N2, start_N2, checkpoint)
