"""trajectory.parquet: log-probs of the probe set under S and every M_t, under every window's reference, and under the
policy inside a step if `probe.every` asks for it.

`t` is the step that made the policy or that read the reference. `update` counts its updates before that moment: up to
the beginning of a reference's window; -1 for the policy at the step's end. Models and first windows have rows of the
whole probe set; what is scored inside a step has rows of the held-out pairs and of the step's own chunk (`chunk`, 0:
held out). A row was `seen` if the model was trained on it.
"""

import numpy as np
import pandas as pd

from sdpo.evals.evaluator import Evaluator
from sdpo.store import Artifact
from sdpo.train.setup import Inputs
from sdpo.train.step import Step

COLUMNS = ["id", "source", "held_out", "chunk", "model", "t", "update", "role", "chosen_logp", "rejected_logp", "seen"]


def table(inputs: Inputs, evaluator: Evaluator, chunks: list[np.ndarray]) -> pd.DataFrame:
    """One row per model and probe; log-probs in nats, summed over the response."""
    names = {measured.model.key: f"M_{t}" for t, measured in enumerate(evaluator.measured)}
    seen = _seen(evaluator)
    frames = []
    for t, (model, step, *_) in enumerate(evaluator.measured):
        scored = _under(model, inputs, chunks, seen[model.key])
        frames.append(scored.assign(model=f"M_{t}", t=t, update=-1, role="policy"))
        if step and step.reference:
            trained: set[int] = set().union(*(seen.get(key, ()) for key in step.windows[0]["weights"]))
            scored = _under(step.reference, inputs, chunks, trained)
            name = names.get(step.reference.key, step.reference.key[:8])
            frames.append(scored.assign(model=name, t=t, update=0, role="reference"))
        if step and (step.model.folder / "probes.parquet").is_file():
            frames.append(_inside(step, inputs, seen[step.spec.start.key]))
    return pd.concat(frames, ignore_index=True)[COLUMNS]


def _under(model: Artifact, inputs: Inputs, chunks: list[np.ndarray], seen: set[int]) -> pd.DataFrame:
    """The whole probe set under a model."""
    runner, held_out = inputs.runner, inputs.held_out
    frames = [_frame(held_out.ids, held_out.sources, runner.logprobs(model, held_out.rows), chunk=0, seen=False)]
    for t, indices in enumerate(chunks, start=1):
        probes = inputs.probes(indices)
        chosen = inputs.train.take(probes)
        known = [i in seen for i in probes.tolist()]
        frames.append(_frame(chosen.ids, chosen.sources, runner.logprobs(model, chosen.rows), chunk=t, seen=known))
    return pd.concat(frames)


def _frame(ids: list[str], sources: np.ndarray, logps_N2: np.ndarray, **columns) -> pd.DataFrame:
    logps = {"chosen_logp": logps_N2[:, 0], "rejected_logp": logps_N2[:, 1]}
    frame = pd.DataFrame({"id": ids, "source": list(sources)} | logps | columns)
    return frame.assign(held_out=frame["chunk"] == 0)


def _inside(step: Step, inputs: Inputs, seen: set[int]) -> pd.DataFrame:
    """What was scored while the step trained; `seen` are the pairs that its start had seen."""
    t = step.spec.t
    looks = pd.read_parquet(step.model.folder / "probes.parquet")
    source = dict(zip(inputs.train.ids, inputs.train.sources, strict=True))
    held_out = dict(zip(inputs.held_out.ids, inputs.held_out.sources, strict=True))
    known = {inputs.train.ids[i] for i in seen}
    return looks.assign(
        model=f"t{t}/" + looks["role"].str[0] + looks["update"].astype(str),  # t2/p32 or t2/r32
        t=t,
        source=looks["id"].map(source | held_out),
        held_out=looks["id"].isin(held_out),
        chunk=np.where(looks["id"].isin(held_out), 0, t),
        seen=looks["trained"] | looks["id"].isin(known),
    )


def _seen(evaluator: Evaluator) -> dict[str, set[int]]:
    """The pairs that each model was trained on, by its key: its own chunk's, and all that its start had seen."""
    initial, *steps = evaluator.measured
    seen: dict[str, set[int]] = {initial.model.key: set()}
    for _, step, chunk, *_ in steps:
        assert step
        seen[step.model.key] = seen[step.spec.start.key] | set(chunk.tolist())
    return seen
