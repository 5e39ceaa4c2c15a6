"""trajectory.parquet: the log-probs of the probe set under S and every M_t, under every window's reference, and under
the policy inside a step where `probe.every` asks for it.

`t` is the step that made the policy or that read the reference. `update` counts its updates before that: up to where
a reference's window begins; -1 for the policy at the step's end. Models and first windows have rows of the whole probe
set; what is scored inside a step has those of the held-out pairs and of the step's own chunk (`chunk`, 0: held out).
A row was `seen` where the model was trained on it.
"""

import pandas as pd

from sdpo.evals.evaluator import Evidence
from sdpo.store import Artifact
from sdpo.train.setup import Inputs
from sdpo.train.step import Step
from sdpo.variants.split import Chunks

COLUMNS = ["id", "source", "held_out", "chunk", "model", "t", "update", "role", "chosen_logp", "rejected_logp", "seen"]


def table(inputs: Inputs, evidence: Evidence, chunks: Chunks) -> pd.DataFrame:
    """One row per model and probe; log-probs in nats, summed over the response."""
    names = {measured.model.key: f"M_{t}" for t, measured in enumerate(evidence.measured)}
    seen = _seen(evidence, chunks)
    frames = []
    for t, (model, step, *_) in enumerate(evidence.measured):
        scored = _under(model, inputs, chunks, seen[model.key])
        frames.append(scored.assign(model=f"M_{t}", t=t, update=-1, role="policy"))
        if step and step.reference:
            trained = set().union(*(seen.get(key, ()) for key in step.windows[0]["weights"]))
            scored = _under(step.reference, inputs, chunks, trained)
            name = names.get(step.reference.key, step.reference.key[:8])
            frames.append(scored.assign(model=name, t=t, update=0, role="reference"))
        if step and (step.model.folder / "probes.parquet").is_file():
            frames.append(_inside(step, t, seen[step.start.key]))
    whole = pd.concat(frames, ignore_index=True)
    whole["source"] = [inputs.pairs[id].source for id in whole["id"]]
    held_out = {row.id for row in inputs.held_out}
    whole["held_out"] = whole["id"].isin(held_out)
    whole["chunk"] = whole["chunk"].mask(whole["held_out"], 0)
    return whole[COLUMNS]


def _under(model: Artifact, inputs: Inputs, chunks: Chunks, seen: set[str]) -> pd.DataFrame:
    """The whole probe set under a model, read from the store or scored now."""
    frames = []
    for chunk, rows in enumerate([inputs.held_out, *map(inputs.probes, chunks)]):
        ids, logps_N2 = [row.id for row in rows], inputs.bench.logprobs(model, rows)
        columns = {"id": ids, "chunk": chunk, "chosen_logp": logps_N2[:, 0], "rejected_logp": logps_N2[:, 1]}
        frames.append(pd.DataFrame(columns | {"seen": [id in seen for id in ids]}))
    return pd.concat(frames)


def _inside(step: Step, t: int, seen: set[str]) -> pd.DataFrame:
    """What was scored while the step trained; `seen` are the ids that its start had seen."""
    looks = pd.read_parquet(step.model.folder / "probes.parquet")
    model = f"t{t}/" + looks["role"].str[0] + looks["update"].astype(str)  # t2/p32 or t2/r32
    return looks.assign(model=model, t=t, chunk=t, seen=looks["trained"] | looks["id"].isin(seen))


def _seen(evidence: Evidence, chunks: Chunks) -> dict[str, set[str]]:
    """The ids that each model was trained on, by its key: its own chunk's, and all that its start had seen."""
    initial, *steps = evidence.measured
    seen: dict[str, set[str]] = {initial.model.key: set()}
    for measured, ids in zip(steps, chunks, strict=True):
        seen[measured.model.key] = seen[measured.step.start.key] | set(ids)
    return seen
