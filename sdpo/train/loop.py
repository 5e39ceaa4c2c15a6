"""The training loop: the updates of one step, against reference log-probs that are plain numbers.

Shape suffixes: N pairs of the chunk, B pairs of a micro-batch.
"""

import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from sdpo import distributed
from sdpo.binding import inputs_of
from sdpo.console import Progress, tell
from sdpo.data.tokenize import response_lengths
from sdpo.errors import UserError
from sdpo.metrics import under_trl_names
from sdpo.model.checkpoints.checkpoint import Checkpoint, Saved
from sdpo.model.engine import Engine
from sdpo.model.logprobs import Scorer, naive_logprobs, score
from sdpo.model.memory import explained, fitting_budget, scoring_budget
from sdpo.model.packing import micro_batches, pack, tokens_of
from sdpo.train import gradient_weight, throughput
from sdpo.train.probes import Sampler
from sdpo.train.reference_logprobs import ReferenceLogprobs
from sdpo.train.schedule import Span, learning_rate
from sdpo.train.step_key import StepSpec
from sdpo.types import ChosenRejected, TokenPair

EXACT = 1e-5  # relative differences up to this one pass the margin gate without a measurement of the rounding
MOST_ROUNDINGS = 3  # larger differences may be this many times the model's rounding
NUM_GAUGED = 8  # pairs on which that rounding is measured
OF_REFERENCE = ("ref_chosen_logp", "ref_rejected_logp", "above_share")  # the last one: reward accuracy without ties
STATS = (
    *("loss", "margin", "lambda_mean", "lambda_square", "reward_accuracy", "kl_proxy", "chosen_logp", "rejected_logp"),
    *OF_REFERENCE,
)
GB = 1e9  # bytes


class Pending(NamedTuple):
    """An update whose statistics are still on the device."""

    number: int
    lr: float
    stats: torch.Tensor
    norm: torch.Tensor
    samples: list[dict[str, str]]  # the policy's answers after it, if they were due


class TrainingLoop:
    """Trains one step. The engine must have the weights of the step's start, and a new optimiser.

    `num_weights` is the number of weights that every token is multiplied with; without it utilisation is not known.
    `beside` is the reference as a model, for a loss that reads its whole distribution.
    """

    def __init__(
        self,
        spec: StepSpec,
        engine: Engine,
        num_weights: int | None = None,
        sampler: Sampler | None = None,
        beside: Scorer | None = None,
    ):
        self.spec, self.engine, self.config = spec, engine, spec.config
        self.num_weights, self.sampler, self.beside = num_weights, sampler, beside
        self.chunk, self.plan, self.loss = spec.chunk, spec.plan, spec.loss
        self.span = spec.span or Span(0, len(self.plan))
        self.inputs = inputs_of(self.loss)
        # None: the loss has no gradient weight.
        self.beta: float | None = self.loss.keywords.get("beta") if spec.reads_reference else None
        self.device = distributed.device(self.config.launch.device)
        self.lengths_N2 = response_lengths(self.chunk.rows).astype(np.float32)
        self.budget = scoring_budget(self.config.launch)
        self.ranks: list[list[int]] = [[0, distributed.world_size()]]  # [updates before, ranks from then on] per change

    def run(self, reference: ReferenceLogprobs, start_N2: np.ndarray, checkpoint: Checkpoint) -> Iterator[dict]:
        """Do all updates and yield one log entry per update, in groups of `record.every`.

        If the step has a checkpoint, the loop goes on from there, and the entries that the checkpoint holds come first.
        If a rank is asked to stop, all save a checkpoint after their present group of updates and exit with STOPPED.
        `start_N2` are the log-probs of the policy at the step's start, which the first update must reproduce. Raises
        UserError if it does not, and if a loss or gradient is not finite.
        """
        reference.keep_start(self.engine)
        entries: list[dict] = []
        if saved := checkpoint.restore(self.engine):
            reference.restore(saved.tensors, saved.log["windows"])
            entries = saved.log["entries"]
            self._go_on(len(entries), saved.log.get("ranks", self.ranks))
        yield from entries
        updates = [self._rows(i) for i in range(len(self.plan))]
        self.budget = fitting_budget(self.engine, updates, self.config.launch, self.beside)
        pending: list[Pending] = []
        began = time.monotonic()
        total, done = (sum(map(len, updates)) for updates in (self.plan, self.plan[: len(entries)]))
        with Progress(total, checkpoint.name, done=done) as bar:
            for number in range(len(entries), len(self.plan)):
                if entries and reference.bound is not None:
                    reference.see(entries[-1]["kl_proxy"], number, len(self.plan))
                pending.append(self._take_update(number, reference, start_N2))
                bar.advance(len(self.plan[number]), self._tokens(number))
                waits = reference.bound is None and len(pending) < self.config.record.every
                if waits and number < len(self.plan) - 1:
                    continue
                for entry in self._entries(pending, began):
                    entries.append(entry)
                    yield entry
                bar.show(f"loss {entries[-1]['loss']:.4f}")
                asked = distributed.gather((distributed.stop_requested(), checkpoint.due()))
                must_stop = any(stop for stop, _ in asked)
                if must_stop or asked[0][1]:  # rank 0's clock decides
                    log = {"entries": entries, "windows": reference.report, "ranks": self.ranks}
                    checkpoint.save(self.engine, Saved(reference.state(), log))
                if must_stop:
                    checkpoint.join()
                    tell(f"asked to stop: update {number + 1} is saved, and the same command goes on from there")
                    raise SystemExit(distributed.STOPPED)
                pending, began = [], time.monotonic()

    def _go_on(self, done: int, ranks: list[list[int]]) -> None:
        """Remember how many ranks did the updates so far, and tell if there are now more or fewer of them."""
        (_, before), (_, now) = ranks[-1], self.ranks[-1]
        self.ranks = ranks if before == now else [*ranks, [done, now]]
        if before != now:
            tell(f"goes on from update {done}, which {before} ranks saved, with {now}: the last digits will differ")

    def _take_update(self, number: int, reference: ReferenceLogprobs, start_N2: np.ndarray) -> Pending:
        torch.manual_seed(self.config.seed * 1_000_003 + number)  # for dropout; the same after a resume
        lr = learning_rate(self.span.before + number, self.span.total, self.config.optim)
        with explained(f"at update {number + 1}", self.budget):
            reference.move(self.spec, number, self.engine, self.budget)
            reference.probes.score_policy_if_due(number, self.engine, self.budget)
            stats, members, logps_B2 = self._compute_gradients(number, reference.logps_N2)
            if number == 0:
                self._check_margins(members, logps_B2, start_N2)
            norm = self.engine.update(lr)
            samples = self.sampler.answers_if_due(number + 1, self.engine) if self.sampler else []
            return Pending(number, lr, stats, norm, samples)

    def _compute_gradients(
        self, number: int, reference_N2: np.ndarray
    ) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
        """Add up the gradients of one update's mean loss.

        Returns summed statistics, and the pairs of this rank with their log-probs [B, 2]. Both tensors stay on the
        device, so that nothing here waits for it.
        """
        indices = self.plan[number]
        packs = micro_batches(self._rows(number), self.budget, distributed.world_size())[distributed.rank()]
        stats, logps = torch.zeros(len(STATS), device=self.device), []
        for position, members in enumerate(packs):
            batch = indices[members]
            policy, data = self._read(batch, reference_N2)
            loss_B = self._loss(policy, data)
            self.engine.backward(loss_B.sum() / len(indices), last=position == len(packs) - 1)
            stats += self._stats(loss_B.detach(), policy, data)
            logps.append(torch.stack(policy, 1).detach())
        return stats, indices[np.concatenate(packs).astype(int)], torch.cat(logps)

    def _read(self, batch: np.ndarray, reference_N2: np.ndarray) -> tuple[ChosenRejected, dict[str, ChosenRejected]]:
        """The policy's log-probs of a micro-batch, with gradients, and what else a loss may read."""
        columns = {"reference": reference_N2, "lengths": self.lengths_N2, "ratings": self.chunk.ratings_N2}
        data = {name: self._columns(values_N2, batch) for name, values_N2 in columns.items()}
        packed = pack([self.chunk.rows[i] for i in batch]).to(self.device)
        if self.beside is None:
            return self.engine.module(packed), data
        policy, data["divergence"] = self.engine.module(packed, self.beside)
        return policy, data

    def _loss(self, policy: ChosenRejected, data: dict[str, ChosenRejected]) -> torch.Tensor:
        return self.loss(*((data | {"policy": policy})[name] for name in self.inputs))

    def _columns(self, values_N2: np.ndarray, batch: np.ndarray) -> ChosenRejected:
        """The values of a micro-batch, on the device."""
        return ChosenRejected(*torch.as_tensor(values_N2[batch], dtype=torch.float32, device=self.device).unbind(1))

    @torch.no_grad()
    def _stats(self, loss_B: torch.Tensor, policy: ChosenRejected, data: dict[str, ChosenRejected]) -> torch.Tensor:
        """Sums over a micro-batch, in the order of STATS."""
        reference = data["reference"]
        margin_B = (policy.chosen - policy.rejected) - (reference.chosen - reference.rejected)
        lambda_B = torch.zeros_like(margin_B)
        if self.beta is not None:
            lambda_B = gradient_weight.of_batch(lambda copy: self._loss(copy, data), policy, self.beta)
        correct_B = (margin_B > 0) + 0.5 * (margin_B == 0)
        kl_B = kl_proxy(policy, reference, data["lengths"])
        columns = (loss_B, margin_B, lambda_B, lambda_B**2, correct_B, kl_B, *policy, *reference, margin_B > 0)
        return torch.stack([column.float().sum() for column in columns])

    def _check_margins(self, members: np.ndarray, logps_B2: torch.Tensor, start_N2: np.ndarray) -> None:
        """The margin gate: the first update's policy must have the log-probs that were stored for the step's start.

        Some processors round bf16 differently in every pack, and the stored log-probs may come from another processor.
        So differences may be as large as this model's rounding, which is measured, and the user is told their size.
        """
        found_B2 = logps_B2.cpu().numpy()
        if self.engine.module.training:  # with dropout, which the stored log-probs do not have
            members, found_B2 = self.plan[0], score(self.engine.module, self._rows(0), self.budget)
        expected_B2 = start_N2[members].astype(np.float64)
        error_B = np.abs(found_B2 - expected_B2).max(1) / np.abs(expected_B2).max(1).clip(1.0)
        errors = zip(np.nan_to_num(error_B, nan=np.inf).tolist(), members.tolist(), strict=True)
        worst, index = max(distributed.gather(max(errors, default=(0.0, 0))))
        if worst <= EXACT:
            return
        error_B2 = (found_B2 - expected_B2) / np.sqrt(self.lengths_N2[members].clip(1))
        error = _root_mean_square(np.concatenate(distributed.gather(error_B2)))
        rounding = self._rounding()
        if not error <= MOST_ROUNDINGS * rounding:
            raise UserError(
                "the policy at the step's start is not the model that was scored: the log-probs of pair "
                f"{self.chunk.rows[index].id} are off by {worst:.2e} (relative), and those of the first update by "
                f"{error:.1e} nats for a response of one token, of which rounding explains {rounding:.1e}; "
                "the stored log-probs, the weights or the tokens have changed"
            )
        tell(
            f"rounding: this processor's {self.config.precision} log-probs depend on a pair's pack, or another "
            f"processor scored the reference: the first update's differ by {error:.1e} nats times the root of a "
            "response's tokens"
        )

    def _rounding(self) -> float:
        """The model's rounding: how far packed and naive log-probs of some pairs differ, as the gate measures it."""
        rows, module, training = self._rows(0)[:NUM_GAUGED], self.engine.module, self.engine.module.training
        module.eval()
        packed_B2 = score(module, rows, self.budget)
        with torch.no_grad():
            naive_B2 = torch.stack([torch.stack(naive_logprobs(self.engine.scorer.model, row)) for row in rows])
        module.train(training)
        return _root_mean_square((packed_B2 - naive_B2.cpu().numpy()) / np.sqrt(response_lengths(rows).clip(1)))

    def _tokens(self, number: int) -> int:
        return sum(map(tokens_of, self._rows(number)))

    def _rows(self, number: int) -> list[TokenPair]:
        return [self.chunk.rows[i] for i in self.plan[number]]

    def _entries(self, pending: list[Pending], began: float) -> Iterator[dict]:
        """The log entries of some updates that started at `began`; statistics are summed over all ranks."""
        totals = distributed.total(torch.stack([update.stats for update in pending])).cpu().double()
        norms = torch.stack([update.norm for update in pending]).tolist()  # of all ranks together, on every rank
        seconds = (time.monotonic() - began) / len(pending)  # the lines above waited for the device to finish
        for update, sums, norm in zip(pending, totals, norms, strict=True):
            yield self._entry(update, sums / len(self.plan[update.number]), norm, seconds)

    def _entry(self, update: Pending, means: torch.Tensor, norm: float, seconds: float) -> dict:
        entry: dict[str, Any] = dict(zip(STATS, means.tolist(), strict=True))
        if not all(map(math.isfinite, [norm, *entry.values()])):
            ids = ", ".join([row.id for row in self._rows(update.number)][:8])
            raise UserError(
                f"update {update.number + 1}: the loss ({entry['loss']}) or the gradient norm ({norm}) is not finite; "
                f"its pairs are {ids} (at most 8); lower optim.lr or look at the pairs; the last checkpoint is kept"
            )
        spread = max(0.0, entry.pop("lambda_square") - entry["lambda_mean"] ** 2) ** 0.5
        entry |= {"lambda_std": spread, "grad_norm": norm, "lr": update.lr}
        entry |= under_trl_names(entry | {name: entry.pop(name) for name in OF_REFERENCE}, self.beta)
        if not self.spec.reads_reference:
            entry |= dict.fromkeys(("margin", "reward_accuracy", "kl_proxy"))
        if self.beta is None:
            entry |= dict.fromkeys(("lambda_mean", "lambda_std"))
        samples = {"samples": update.samples} if update.samples else {}
        return {"update": update.number + 1, **entry, **self._cost(update.number, seconds), **samples}

    def _cost(self, number: int, seconds: float) -> dict[str, float]:
        """What an update took: `seconds`, the speed of all ranks together, and this rank's peak of memory.

        The speed is that of the update alone, also if the reference moved before it; what is unknown of it is left out.
        """
        tokens = self._tokens(number)
        pace = throughput.Pace(tokens, seconds)
        speed = throughput.speed(self.config, self.num_weights, pace, throughput.Pace(0, 0))
        known = {name: value for name, value in speed._asdict().items() if value is not None}
        size = {"pairs": len(self.plan[number]), "tokens": tokens, "seconds": seconds}
        return size | known | {"memory_gb": throughput.peak_memory(self.device) / GB}


def kl_proxy(policy: ChosenRejected, reference: ChosenRejected, lengths: ChosenRejected) -> torch.Tensor:
    """A cheap sign of how far the policy is from the reference [B]; nats per token. It is no KL.

    Half the squared log-ratio per token (k2, Schulman 2020, "Approximating KL Divergence"), as the mean of the chosen
    and the rejected response. k2 estimates the KL of a policy on its own samples. Here the responses are given, and the
    log-ratio of each is averaged over its tokens before it is squared, which makes the value smaller.
    """
    chosen_B = (policy.chosen - reference.chosen) / lengths.chosen.clip(1)
    rejected_B = (policy.rejected - reference.rejected) / lengths.rejected.clip(1)
    return (chosen_B**2 + rejected_B**2) / 4


def _root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
