"""The pairs that are followed through a run, and their log-probs at what happens inside a step.

The probe set is fixed: all held-out rows and a sample of every chunk. A step follows the held-out rows and the sample
of its own chunk.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from sdpo.model.engine import Engine
from sdpo.model.logprobs import score
from sdpo.types import TokenPair

NUM_PROBES = 64  # rows of every chunk


def sample(ids: list[str], indices: np.ndarray) -> np.ndarray:
    """The pairs of a chunk that are followed, as sorted indices; which ones depends on their ids alone."""
    ranked = sorted(set(indices.tolist()), key=lambda i: hashlib.sha256(ids[i].encode()).digest())
    return np.array(sorted(ranked[:NUM_PROBES]), dtype=int)


class Probes:
    """The log-probs of a step's probe rows, each time they were looked at while it trained."""

    def __init__(self, rows: Sequence[TokenPair], every: int):
        self.rows, self.every = rows, every
        self.looks: dict[str, torch.Tensor] = {}  # "<role>/<updates so far>" -> [rows, chosen and rejected]

    def follow(self, update: int, engine: Engine, budget: int) -> None:
        """Look at the policy, where `every` updates have passed since the last look."""
        if self.every and update and update % self.every == 0:
            self.look("policy", update, engine, budget)

    def look(self, role: str, update: int, engine: Engine, budget: int) -> None:
        """Score the rows with the weights in memory, which stand for `role` after this many updates."""
        if self.rows:
            self.looks[f"{role}/{update}"] = torch.from_numpy(score(engine.module, self.rows, budget))

    def write(self, path: Path, rows: list[TokenPair], plan: list[np.ndarray]) -> None:
        """Keep the looks, where there were any, as a table; `trained` where an update before the look read the row."""
        frames = []
        for look in sorted(self.looks, key=lambda look: (int(look.split("/")[1]), look)):
            (role, update), logps_N2 = look.split("/"), self.looks[look]
            trained = {rows[i].id for batch in plan[: int(update)] for i in batch}
            frames.append(
                pd.DataFrame(
                    {
                        "id": [row.id for row in self.rows],
                        "role": role,
                        "update": int(update),
                        "chosen_logp": logps_N2[:, 0].numpy(),
                        "rejected_logp": logps_N2[:, 1].numpy(),
                        "trained": [row.id in trained for row in self.rows],
                    }
                )
            )
        if frames:
            pd.concat(frames, ignore_index=True).to_parquet(path, index=False)
