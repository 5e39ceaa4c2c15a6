"""trajectory.parquet: log-probs of the probe pairs under S, every M_t, every window's reference, and, if `probe.every`
is set, the policy inside a step.

`t` is the step that trained the policy or that used the reference. `update` is the number of updates of that step
before the log-probs were computed; -1 stands for the policy at the step's end. S, every M_t and the first reference of
a step have one row per probe pair; later references and policies inside a step have rows for the held-out pairs and the
step's own chunk only. `chunk` is 0 for held-out pairs. `seen` says whether the model was trained on the pair.
"""

import numpy as np
import pandas as pd

from sdpo.evals.evaluator import Evaluator
from sdpo.store.artifacts import Artifact
from sdpo.train.setup import Inputs
from sdpo.train.step import Step

COLUMNS = ["id", "source", "held_out", "chunk", "model", "t", "update", "role", "chosen_logp", "rejected_logp", "seen"]


def table(inputs: Inputs, evaluator: Evaluator, chunks: list[np.ndarray]) -> pd.DataFrame:
    """One row per model and probe pair; log-probs in nats, summed over the response."""
    names = {measured.model.key: f"M_{t}" for t, measured in enumerate(evaluator.measured)}
    seen = _seen(inputs, evaluator)
    frames = []
    for t, (model, step, *_) in enumerate(evaluator.measured):
        scored = _score_probes(model, inputs, chunks, seen[model.key])
        frames.append(scored.assign(model=f"M_{t}", t=t, update=-1, role="policy"))
        if step and step.reference:
            trained: set[int] = set().union(*(seen.get(key, ()) for key in step.windows[0]["weights"]))
            scored = _score_probes(step.reference, inputs, chunks, trained)
            name = names.get(step.reference.key, step.reference.key[:8])
            frames.append(scored.assign(model=name, t=t, update=0, role="reference"))
        if step and (step.model.folder / "probes.parquet").is_file():
            frames.append(_inside_step(step, inputs, seen[step.spec.start.key]))
    return pd.concat(frames, ignore_index=True)[COLUMNS]


def _score_probes(model: Artifact, inputs: Inputs, chunks: list[np.ndarray], seen: set[int]) -> pd.DataFrame:
    """The log-probs of all probe pairs under a model; `seen` are the indices of the pairs that it was trained on."""
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


def _inside_step(step: Step, inputs: Inputs, seen: set[int]) -> pd.DataFrame:
    """The log-probs that the step computed while it trained; `seen` are the pairs that its start was trained on."""
    t = step.spec.t
    probed = pd.read_parquet(step.model.folder / "probes.parquet")
    source = dict(zip(inputs.train.ids, inputs.train.sources, strict=True))
    held_out = dict(zip(inputs.held_out.ids, inputs.held_out.sources, strict=True))
    known = {inputs.train.ids[i] for i in seen}
    return probed.assign(
        model=f"t{t}/" + probed["role"].str[0] + probed["update"].astype(str),  # t2/p32 (policy) or t2/r32 (reference)
        t=t,
        source=probed["id"].map(source | held_out),
        held_out=probed["id"].isin(held_out),
        chunk=np.where(probed["id"].isin(held_out), 0, t),
        seen=probed["trained"] | probed["id"].isin(known),
    )


def _seen(inputs: Inputs, evaluator: Evaluator) -> dict[str, set[int]]:
    """By model key, the indices of the pairs that the model was trained on: its step's, and those of its start."""
    initial, *steps = evaluator.measured
    seen: dict[str, set[int]] = {initial.model.key: set()}
    for _, step, chunk, *_ in steps:
        assert step  # only S has none
        trained = {row.id for row in step.spec.chunk.rows}  # not the given pairs, if the newest model answered anew
        own = {i for i in chunk.tolist() if inputs.train.ids[i] in trained}
        seen[step.model.key] = seen[step.spec.start.key] | own
    return seen
