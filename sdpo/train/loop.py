"""The inner loop: the updates of one step, against reference log-probs that are only read.

Shape suffixes: N pairs of the chunk, B pairs of a micro-batch.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from sdpo.binding import needs
from sdpo.config import Config, Optim
from sdpo.data.tokenize import TokenPair, response_lengths
from sdpo.launch import local as launch
from sdpo.metrics import progress
from sdpo.model.checkpoint import Checkpoint
from sdpo.model.engine import Engine
from sdpo.model.logprobs import score
from sdpo.model.memory import explained, fitting_budget
from sdpo.model.packing import micro_batches, pack, tokens_of
from sdpo.train import gradient_weight
from sdpo.train.reference_logprobs import MovingReference
from sdpo.variants.loss import Both

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # of the margin gate, relative to the size of the log-probs
STATS = ("loss", "margin", "lambda_mean", "lambda_square", "reward_accuracy", "chosen_logp", "rejected_logp")


class Chunk(NamedTuple):
    """The pairs of one step, and what a loss may read of them; columns are chosen, rejected."""

    rows: list[TokenPair]
    ratings_N2: np.ndarray
    probes: Sequence[TokenPair] = ()  # the pairs that are followed while it trains


def updates(num_pairs: int, optim: Optim, seed: int) -> list[np.ndarray]:
    """Which pairs each update reads: a fresh permutation every epoch, which depends on the seed alone."""
    plan = []
    for epoch in range(optim.epochs):
        order = np.random.default_rng([seed, epoch]).permutation(num_pairs)
        plan += np.split(order, range(optim.pairs_per_update, num_pairs, optim.pairs_per_update))
    return plan


class Span(NamedTuple):
    """What one schedule spans: the updates before this step's, and all of them."""

    before: int
    total: int


def learning_rate(update: int, num_updates: int, optim: Optim) -> float:
    """Linear warm-up, then the schedule down to 0 after `num_updates` (`update` counts from 0)."""
    warmup = math.ceil(optim.warmup * num_updates)
    if update < warmup:
        return optim.lr * (update + 1) / warmup
    left = (num_updates - update) / max(1, num_updates - warmup)
    shapes = {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}
    return optim.lr * shapes[optim.schedule]


class Fit:
    """One step's training: an engine at its start, a chunk, a loss, and the numbers the loss is anchored to."""

    def __init__(self, engine: Engine, chunk: Chunk, loss: Callable, config: Config, span: Span | None):
        self.engine, self.chunk, self.loss, self.config = engine, chunk, loss, config
        self.plan = updates(len(chunk.rows), config.optim, config.seed)
        self.span = span or Span(0, len(self.plan))
        self.beta = loss.keywords.get("beta")
        self.reads = needs(loss)
        self.weighs = self.beta is not None and "reference" in self.reads
        self.device = launch.device(config.launch.device)
        self.lengths_N2 = response_lengths(chunk.rows).astype(np.float32)
        self.budget = config.launch.tokens_per_pack

    def run(self, reference: MovingReference, start_N2: np.ndarray, checkpoint: Checkpoint) -> list[dict]:
        """All updates of the step; returns one log entry per update.

        `start_N2` are the log-probs of the policy at the step's start, which the first update must reproduce. Raises
        ValueError where it does not, or where a loss or gradient is not finite.
        """
        reference.begin(self.engine)
        entries = checkpoint.restore(self.engine, reference)
        self.budget = fitting_budget(self.engine, [self._rows(n) for n in range(len(self.plan))], self.config)
        bar = progress(sum(map(len, self.plan)), checkpoint.name, quiet=not launch.is_main())
        bar.advance(sum(len(update) for update in self.plan[: len(entries)]))
        pending, every, began = [], self.config.record.every, time.monotonic()
        for number in range(len(entries), len(self.plan)):
            torch.manual_seed(self.config.seed * 1_000_003 + number)  # dropout, the same after a resume
            lr = learning_rate(self.span.before + number, self.span.total, self.config.optim)
            with explained(f"at update {number + 1}", self.budget):
                reference.move(number, self.engine, self.chunk.rows, self.plan, self.budget)
                reference.probes.follow(number, self.engine, self.budget)
                stats, members, logps_B2 = self._update(number, reference.logps_N2)
                if number == 0:
                    self._gate(members, logps_B2, start_N2)
                pending.append((number, self.engine.update(lr), stats, lr))
            bar.advance(len(self.plan[number]), self._tokens(number))
            if len(pending) == every or number == len(self.plan) - 1:
                entries += self._entries(pending, time.monotonic() - began)
                checkpoint.save(self.engine, reference, entries)
                pending, began = [], time.monotonic()
        bar.close()
        return entries

    def _update(self, number: int, reference_N2: np.ndarray) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
        """Gradients of one update's mean loss; returns summed statistics, and this rank's pairs with their log-probs.

        Both tensors stay on the device: nothing here waits for it.
        """
        indices = self.plan[number]
        mine = micro_batches(self._rows(number), self.budget, launch.world_size())[launch.rank()]
        stats, logps = torch.zeros(len(STATS), device=self.device), []
        for position, members in enumerate(mine):
            batch = indices[members]
            policy = self.engine.forward(pack([self.chunk.rows[i] for i in batch]).to(self.device))
            reference = self._both(reference_N2, batch)
            loss_B = self._loss(policy, reference, batch)
            self.engine.backward(loss_B.sum() / len(indices), last=position == len(mine) - 1)
            stats += self._stats(loss_B.detach(), policy, reference, batch)
            logps.append(torch.stack(policy, 1).detach())
        return stats, indices[np.concatenate(mine).astype(int)], torch.cat(logps)

    def _loss(self, policy: Both, reference: Both, batch: np.ndarray) -> torch.Tensor:
        available = {
            "policy": lambda: policy,
            "reference": lambda: reference,
            "lengths": lambda: self._both(self.lengths_N2, batch),
            "ratings": lambda: self._both(self.chunk.ratings_N2, batch),
        }
        return self.loss(*(available[name]() for name in self.reads))

    def _both(self, values_N2: np.ndarray, batch: np.ndarray) -> Both:
        return Both(*torch.as_tensor(values_N2[batch], dtype=torch.float32, device=self.device).unbind(1))

    @torch.no_grad()
    def _stats(self, loss_B: torch.Tensor, policy: Both, reference: Both, batch: np.ndarray) -> torch.Tensor:
        """Sums over a micro-batch, in the order of STATS."""
        margin_B = (policy.chosen - policy.rejected) - (reference.chosen - reference.rejected)
        lambda_B = torch.zeros_like(margin_B)
        if self.weighs:
            lambda_B = gradient_weight.of_batch(lambda copy: self._loss(copy, reference, batch), policy, self.beta)
        correct_B = (margin_B > 0) + 0.5 * (margin_B == 0)
        columns = (loss_B, margin_B, lambda_B, lambda_B**2, correct_B, policy.chosen, policy.rejected)
        return torch.stack([column.float().sum() for column in columns])

    def _gate(self, members: np.ndarray, logps_B2: torch.Tensor, start_N2: np.ndarray) -> None:
        """The margin gate: the first update's policy must give the log-probs recorded for the step's start."""
        found_B2 = logps_B2.cpu().numpy()
        if self.engine.module.training:  # dropout is no part of what was recorded
            members, found_B2 = self.plan[0], score(self.engine.module, self._rows(0), self.budget)
        expected_B2 = start_N2[members].astype(np.float64)
        error_B = np.abs(found_B2 - expected_B2).max(1) / np.abs(expected_B2).max(1).clip(1.0)
        errors = zip(np.nan_to_num(error_B, nan=np.inf).tolist(), members.tolist(), strict=True)
        worst, index = max(launch.gather(max(errors, default=(0.0, 0))))
        if not worst <= TOLERANCE[self.config.precision]:
            raise ValueError(
                "the policy at the step's start is not the one that was scored: pair "
                f"{self.chunk.rows[index].id} is off by {worst:.2e} (relative); "
                "the stored log-probs, the weights or the tokens have changed"
            )

    def _tokens(self, number: int) -> int:
        return sum(map(tokens_of, self._rows(number)))

    def _rows(self, number: int) -> list[TokenPair]:
        return [self.chunk.rows[i] for i in self.plan[number]]

    def _entries(self, pending: list[tuple], seconds: float) -> list[dict]:
        """Bring the statistics of some updates to the host, over all ranks, and stop where one is not finite."""
        totals = torch.stack([torch.cat([stats, norm.reshape(1).to(stats)]) for _, norm, stats, _ in pending])
        totals = launch.total(totals).cpu().double()
        norms = totals[:, -1] / launch.world_size()
        entries = []
        for (number, _, _, lr), sums, norm in zip(pending, totals, norms.tolist(), strict=True):
            means = (sums[:-1] / len(self.plan[number])).tolist()
            entry = dict(zip(STATS, means, strict=True))
            if not all(map(math.isfinite, [norm, *means])):
                ids = ", ".join([row.id for row in self._rows(number)][:8])
                raise ValueError(
                    f"update {number + 1}: the loss ({entry['loss']}) or the gradient norm ({norm}) is not finite; "
                    f"its pairs are {ids} (at most 8); lower optim.lr or look at them; the last checkpoint is kept"
                )
            spread = max(0.0, entry.pop("lambda_square") - entry["lambda_mean"] ** 2) ** 0.5
            entry |= {"lambda_std": spread, "grad_norm": norm, "lr": lr}
            if "reference" not in self.reads:
                entry |= dict.fromkeys(("margin", "reward_accuracy"))
            if not self.weighs:
                entry |= dict.fromkeys(("lambda_mean", "lambda_std"))
            size = {"pairs": len(self.plan[number]), "tokens": self._tokens(number)}
            entries.append({"update": number + 1, **entry, **size, "seconds": seconds / len(pending)})
        return entries
