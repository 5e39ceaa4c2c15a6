"""On-policy rounds: the pairs of a step are answers that the newest model gives to the chunk's prompts, judged.

With reference=previous this is iterative DPO, with reference=initial it is that of Online-RLHF (2405.07863), and with
loss=sppo_hard the rounds are those of SPPO (2405.00675).

Shapes: P prompts, K answers per prompt; columns of N x 2 are the chosen and the rejected answer.
"""

import random
from functools import cached_property
from typing import Any, TypedDict

import numpy as np

from sdpo.config import Config
from sdpo.console import tell
from sdpo.curriculum import round_judges
from sdpo.data.tokenize import content_hash
from sdpo.errors import UserError
from sdpo.evals import generation
from sdpo.evals.decoding import Decoding
from sdpo.evals.generation import LIBRARIES, Answer
from sdpo.store.artifacts import Artifact, key_of
from sdpo.train import probes
from sdpo.train.setup import Inputs
from sdpo.types import Chunk, TokenPair

KIND = "round"  # of the artifacts that hold judged answers


class Judged(TypedDict):
    """The first of the best and the first of the worst answers to a prompt, and their rewards."""

    best: Answer
    worst: Answer
    rewards: tuple[float, float]


def chunk(inputs: Inputs, config: Config, indices: np.ndarray, newest: Artifact) -> Chunk:
    """The pairs of a step: these training pairs, or those of an on-policy round in which M_{t-1} answers."""
    if config.rounds.name == "given":
        return inputs.chunk(indices)
    return Round(inputs, config, indices, newest).chunk()


class Round:
    """What the pairs of a step are made from: a chunk, whose prompts are answered, and the model that answers."""

    def __init__(self, inputs: Inputs, config: Config, indices: np.ndarray, model: Artifact):
        """`indices` are the chunk's training pairs. `model` is M_{t-1}; it need not exist before `chunk` is called."""
        self.inputs, self.config, self.model = inputs, config, model
        positions = random.Random(config.seed).sample(range(len(indices)), round(config.rounds.share * len(indices)))
        asked = np.isin(np.arange(len(indices)), positions)
        self.asked, self.kept = inputs.train.take(indices[asked]), inputs.train.take(indices[~asked])

    @property
    def key(self) -> str:
        return key_of(KIND, self.determinants)

    @cached_property
    def determinants(self) -> dict[str, Any]:
        """Everything that the pairs depend on. It is known before they exist, and even before the model does."""
        nothing = np.zeros(0, dtype=np.int32)
        return {
            "weights": self.model.key,
            "prompts": content_hash(row._replace(chosen=nothing, rejected=nothing) for row in self.asked.rows),
            "decoding": self._decoding.determinants(),
            "answers": self.config.rounds.answers,
            "judge": round_judges.determinants(self.config.rounds),
            "template": [self.config.data.template, self.config.data.template_date],
            **self.inputs.runner.determinants_of_stops(),
            **self.inputs.runner.numerics.of_own_forward(),
            **LIBRARIES,
        }

    def chunk(self) -> Chunk:
        """The pairs that the step trains on: made, or from the store. Those of prompts that are not asked are given.

        Responses are the tokens that were sampled, and ratings are the rewards. Raises UserError if all answers to
        every prompt are worth the same.
        """
        store = self.inputs.runner.store
        judged: list[Judged | None] = store.make_json(KIND, self.determinants, self._judge_answers)
        decided = [(row, both) for row, both in zip(self.asked.rows, judged, strict=True) if both]
        num_cut = sum(not both[side]["ended"] for _, both in decided for side in ("best", "worst"))
        tell(
            f"{len(judged)} prompts answered by the newest model: {len(decided)} pairs ({num_cut} responses end at "
            f"rounds.max_new_tokens); {len(judged) - len(decided)} prompts left out, their answers are worth the same"
        )
        rows = [
            TokenPair(f"{row.id}@{self.key[:8]}", row.prompt, *(_ids(both[side]) for side in ("best", "worst")))
            for row, both in decided
        ]
        ratings_N2 = np.array([both["rewards"] for _, both in decided], dtype=np.float32).reshape(-1, 2)
        if not rows + self.kept.rows:
            raise UserError(
                f"all {self.config.rounds.answers} answers to each of {len(judged)} prompts are worth the same to "
                f"rounds.judge={self.config.rounds.judge}: raise rounds.answers or rounds.temperature"
            )
        rows += self.kept.rows
        return Chunk(
            rows,
            np.concatenate([ratings_N2, self.kept.ratings_N2]),
            self.inputs.held_out.rows,
            probed=probes.sample([row.id for row in rows], np.arange(len(rows)), self.config.probe.num_pairs).tolist(),
            made_from=store.folder(KIND, self.key) / "value.json",
        )

    @property
    def _decoding(self) -> Decoding:
        settings = self.config.rounds
        return Decoding(settings.temperature, settings.max_new_tokens, settings.batch_size, self.config.seed)

    def _judge_answers(self) -> list[Judged | None]:
        """For each prompt two answers; None if all its answers are worth the same."""
        if not self.asked.rows:
            return []
        answers_PK = self._sample()
        rewards_PK = round_judges.rewards(self.config.rounds, self.asked.pairs, answers_PK, self.inputs.runner)
        judged: list[Judged | None] = []
        for answers, rewards in zip(answers_PK, rewards_PK, strict=True):
            best, worst = int(rewards.argmax()), int(rewards.argmin())
            ends = (float(rewards[best]), float(rewards[worst]))
            judged.append(Judged(best=answers[best], worst=answers[worst], rewards=ends) if ends[0] > ends[1] else None)
        return judged

    def _sample(self) -> list[list[Answer]]:
        """The answers to every prompt [P][K]. Raises UserError if they could be too long to train on."""
        runner, data, num = self.inputs.runner, self.config.data, self.config.rounds.answers
        prompts = [row.prompt.tolist() for row in self.asked.rows]
        longest = max(map(len, prompts), default=0) + self._decoding.max_new_tokens
        if longest > data.max_tokens:
            raise UserError(
                f"the longest prompt and an answer of rounds.max_new_tokens={self._decoding.max_new_tokens} have "
                f"{longest} tokens, more than data.max_tokens={data.max_tokens}: lower the one or raise the other"
            )
        repeated = [ids for ids in prompts for _ in range(num)]
        found = generation.generate(generation.load_alone(self.model, runner), runner.chat, repeated, self._decoding)
        return [found[i : i + num] for i in range(0, len(found), num)]


def _ids(answer: Answer) -> np.ndarray:
    return np.array(answer["ids"], dtype=np.int32)
