"""Probes: the pairs that are followed through a run. Their log-probs show what training does to single pairs.

Samples are the policy's answers to fixed prompts while it trains.

The probe set of a run is all held-out rows and a sample of every chunk. Inside a step, the held-out rows and the sample
of the step's own chunk are scored.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import GenerationConfig, PretrainedConfig

from sdpo import distributed
from sdpo.config import Config
from sdpo.data import prompts as prompt_files
from sdpo.data.schemas import Message, Turns
from sdpo.data.tokenize import prompt_ids
from sdpo.model import limits
from sdpo.model.attention.interface import own_attention
from sdpo.model.engine import Engine
from sdpo.model.logprobs import score
from sdpo.model.sampling import continuations
from sdpo.train.runner import Runner
from sdpo.types import TokenPair


def sample(ids: list[str], indices: np.ndarray, num: int) -> np.ndarray:
    """At most `num` probes of a chunk as sorted indices. Which pairs of the chunk they are depends on the ids alone."""
    ranked = sorted(set(indices.tolist()), key=lambda i: hashlib.sha256(ids[i].encode()).digest())
    return np.array(sorted(ranked[:num]), dtype=int)


class Probes:
    """Scores the probe rows of a step while it trains, and keeps their log-probs."""

    def __init__(self, rows: Sequence[TokenPair], every: int):
        self.rows, self.every = rows, every
        self.logps: dict[str, torch.Tensor] = {}  # "<role>/<updates so far>" -> [rows, chosen and rejected]

    def score_policy_if_due(self, update: int, engine: Engine, budget: int) -> None:
        """Score the rows under the policy after every `every` updates; never if it is 0."""
        if self.every and update and update % self.every == 0:
            self.score("policy", update, engine, budget)

    def score(self, role: str, update: int, engine: Engine, budget: int) -> None:
        """Score the rows under the engine's present weights, which are those of `role` after this many updates."""
        if self.rows:
            self.logps[f"{role}/{update}"] = torch.from_numpy(score(engine.module, self.rows, budget))

    def write(self, path: Path, rows: list[TokenPair], plan: list[np.ndarray]) -> None:
        """Write all log-probs as one table, if there are any; `rows` and `plan` are the step's chunk and its updates.

        The column `trained` says whether an update before the scoring read the row.
        """
        lines = []
        for name in sorted(self.logps, key=lambda name: (int(name.split("/")[1]), name)):
            role, update = name.split("/")
            trained = {rows[i].id for batch in plan[: int(update)] for i in batch}
            for row, logps in zip(self.rows, self.logps[name].numpy(), strict=True):
                lines.append((row.id, role, int(update), *logps, row.id in trained))
        if lines:
            columns = ["id", "role", "update", "chosen_logp", "rejected_logp", "trained"]
            pd.DataFrame(lines, columns=columns).to_parquet(path, index=False)


class Sampler:
    """Answers fixed prompts with the policy while it trains; greedily, so that no random number is drawn."""

    def __init__(self, config: Config, runner: Runner):
        """Read `probe.file`, if it is set. Raises UserError for a file that cannot be read."""
        self.settings = config.probe
        self.questions: list[str] = []
        if config.probe.file:
            self.questions = [prompt.turns[0] for prompt in prompt_files.read(config.probe.file)]
            self._chat = runner.chat
            turns: list[Turns] = [(Message(role="user", content=question),) for question in self.questions]
            self._prompts = prompt_ids(self._chat, turns)

    def check(self, model: PretrainedConfig) -> None:
        """Raise UserError if a prompt of `probe.file` and its answer may be longer than the model reads."""
        if self.questions:
            most, file = self.settings.max_new_tokens, f"the prompts of probe.file={self.settings.file}"
            limits.check_answers(self._prompts, most, model, "probe.max_new_tokens", file)

    def answers_if_due(self, num_updates: int, engine: Engine) -> list[dict[str, str]]:
        """The first rank's answers after every `answers_every` updates, as prompt and answer; else nothing."""
        if not self.questions or num_updates % self.settings.answers_every or not distributed.is_main():
            return []
        network, was_training = engine.scorer.model, engine.scorer.model.training
        before, stops = network.generation_config, self._chat.stops
        limits = {"max_new_tokens": self.settings.max_new_tokens, "eos_token_id": stops, "pad_token_id": stops[0]}
        network.generation_config = GenerationConfig(do_sample=False, **limits)
        network.eval()
        try:
            with own_attention(network), torch.no_grad():
                answers = continuations(network, self._prompts, stops)
        finally:
            network.generation_config = before
            network.train(was_training)
        written = [ids[:-1] if ids[-1] in stops else ids for ids in answers]
        texts = [str(self._chat.tokenizer.decode(ids, skip_special_tokens=True)) for ids in written]
        return [{"prompt": prompt, "answer": text} for prompt, text in zip(self.questions, texts, strict=True)]
