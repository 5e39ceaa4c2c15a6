"""Computes summed response log-probabilities log pi(y|x): packed for training and scoring, naively to check them.

Shapes: B pairs, N rows, T tokens of the stream, R response tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sdpo import distributed
from sdpo.errors import UserError
from sdpo.model import rotary
from sdpo.model.attention import interface as backends
from sdpo.model.head import Head
from sdpo.model.hub import EXPERTS, share_of_experts
from sdpo.model.packing import Pack, pack, scoring_packs
from sdpo.types import ChosenRejected, TokenPair

# Nats by which rounding may change the log-prob of a response of one token. A logit near 32 is rounded by up to 2^-19
# in fp32 and 2^-3 in bf16; 8 to 16 times that allows for the layers before it. (SmolLM2-135M in bf16, packed against
# naive: root mean square 0.06, the largest of 120 0.16.)
ROUNDING = {torch.float32: 2.0**-15, torch.bfloat16: 1.0}

# Settings of a model from whose value on, in tokens, its attention may be another one.
LIMITS = (
    "sliding_window",
    "window_size",
    "attention_chunk_size",
    "local_attention",
    "original_max_position_embeddings",
)


class Scorer(nn.Module):
    """A causal language model (`.model`) whose forward pass takes a pack and returns log-probs.

    `attention` is auto, sdpa, varlen, flex or plain. Raises UserError, which names the model, if the packed log-probs
    differ from those of the model's own forward pass in a check of sequences of up to `longest` tokens (None: whoever
    makes the scorer checks it, on its device).
    """

    def __init__(self, model: PreTrainedModel, attention: str = "auto", longest: int | None = 1024):
        super().__init__()
        if model.get_decoder() is model:
            raise UserError(f"{type(model).__name__} has no decoder apart from its head, and cannot be scored here")
        self.model, self.head, self.attention = model, Head(model), attention
        if attention != "plain":
            backends.share_prompts(model)
        self.decode = model.get_decoder().__call__  # a bound method: a submodule would register its parameters twice
        self.shape = backends.reshapes_scores(model), backends.head_sizes(model)
        self.longest_packed = rotary.longest_with_fixed_frequencies(model.config.get_text_config())
        rotary.forget_lengths(model)
        self.train(model.training)
        if longest is not None:
            check_packing(self, longest)

    @property
    def backend(self) -> str:
        """The attention backend for the model's present device and dtype."""
        weight = self.head.weight
        return backends.choose_backend(self.attention, weight.device, weight.dtype, *self.shape)

    def forward(self, pack: Pack, reference: "Scorer | None" = None) -> ChosenRejected | tuple[ChosenRejected, ...]:
        """Summed log-probs [B], fp32, in nats, of the chosen and the rejected responses; 0 for an empty response.

        With a `reference`, whose vocabulary is the same, the sums of KL(reference || this) over the tokens that follow
        come second. If the rows have weights of their tokens, a sum is that of weight * value. If rotary frequencies
        depend on the length of a sequence of this pack, each sequence has a pass of its own.
        """
        if pack.longest <= self.longest_packed:
            sums = self._sums(pack, reference)
        else:
            apart = [self._sums(alone, reference) for alone in pack.apart()]
            sums = [torch.cat([both_2[:1] for both_2 in kind]) for kind in zip(*apart, strict=True)]
        logps, *divergence = (ChosenRejected(*sums_2B.view(-1, 2).unbind(1)) for sums_2B in sums)
        return (logps, *divergence) if reference else logps

    def _sums(self, pack: Pack, reference: "Scorer | None") -> list[Tensor]:
        """What `forward` returns, each [2B], chosen and rejected in turn."""
        other = reference and reference.head.distribution(reference.before_responses(pack))
        values = self.head(self.before_responses(pack), pack.targets_R, other)
        return [self._per_response(values_R, pack) for values_R in values]

    def _per_response(self, values_R: Tensor, pack: Pack) -> Tensor:
        if pack.weights_R is not None:
            values_R = values_R * pack.weights_R
        # Sum in fp64, whose rounding is far below that of the terms. The last two sums are the closing pair's.
        sums = values_R.new_zeros(2 * pack.num_pairs + 2, dtype=torch.float64)
        sums = sums.index_add(0, pack.branches_R, values_R.double())
        return sums[: 2 * pack.num_pairs].float()

    def before_responses(self, pack: Pack) -> Tensor:
        """The last hidden states [R, H] from which the head predicts the response tokens."""
        return self._hidden(pack).index_select(0, pack.rows_R)

    def _hidden(self, pack: Pack) -> Tensor:
        """Last hidden states [T, H] of the stream, before the head."""
        name = self.backend
        if name != "plain":
            return self._run(pack.tokens_T, pack.positions_T, packed=backends.BACKENDS[name](pack))
        if pack.longest > self.longest_packed:  # one sequence: its length must be that with its last token
            return self._run(pack.tokens_T, pack.positions_T)
        sequences = zip(pack.keys_K.split(pack.lengths_S), pack.own_S, strict=True)
        return torch.cat([self._run(pack.tokens_T[at], pack.positions_T[at])[-own:] for at, own in sequences])

    def _run(self, tokens_T: Tensor, positions_T: Tensor, **extra: Any) -> Tensor:
        output = self.decode(input_ids=tokens_T[None], position_ids=positions_T[None], use_cache=False, **extra)
        return output.last_hidden_state[0]


def check_packing(scorer: Scorer, longest: int) -> None:
    """Raise UserError if packed and naive log-probs of a few pairs differ, on the scorer's device and in its dtype.

    The check catches models that do something with attention or logits that this code does not know: ALiBi, recurrence,
    another scaling. Pairs are longer than each limit that the configuration names (sliding windows, lengths from which
    on rotary frequencies change), but not longer than `longest`, which no sequence that is scored exceeds. If prompts
    are shared, it also raises UserError if the log-probs of responses depend on those beside them in the pack.
    """
    config = scorer.model.config.get_text_config()
    named = {getattr(config, name, None) or 0 for name in LIMITS} | {scorer.longest_packed}
    beyond = [int(limit) + 1 for limit in sorted(named) if 0 < limit < longest - 24]
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, longest + 64, dtype=np.int32)
    rows = [
        TokenPair("", tokens[:prompt], *(tokens[prompt : prompt + n] for n in responses))
        for prompt, responses in [(1, (7, 2)), (5, (12, 24)), *((prompt, (17, 24)) for prompt in beyond)]
    ]
    training = scorer.training
    scorer.eval()
    with torch.no_grad():
        try:
            packed = torch.stack(scorer(pack(rows).to(scorer.head.weight.device)), 1)
            leaks = scorer.attention != "plain" and _read_each_other(scorer, rows[:2])
        except (AttributeError, TypeError) as error:  # of model code that computes with the mask
            raise UserError(backends.refusal(scorer.model, f"its attention reads its mask ({error})")) from error
        naive = torch.stack([torch.stack(naive_logprobs(scorer.model, row)) for row in rows])
    scorer.train(training)
    if exceeds_rounding(packed.cpu().numpy(), naive.cpu().numpy(), rows, scorer.head.weight.dtype):
        reason = f"its log-probs would be {packed.tolist()}, not {naive.tolist()}"
        raise UserError(backends.refusal(scorer.model, reason))
    if leaks:
        raise UserError(backends.refusal(scorer.model, "each response of a pack would read those before it"))


def _read_each_other(scorer: Scorer, rows: Sequence[TokenPair]) -> bool:
    """Whether log-probs of the rejected responses change with the tokens of the chosen ones, or the reverse.

    Rounding explains no change between packs of one shape, except with experts: their products depend on the routing.
    """
    vocabulary = scorer.model.config.get_text_config().vocab_size
    other_chosen = [row._replace(chosen=(row.chosen + 1) % vocabulary) for row in rows]
    other_rejected = [row._replace(rejected=(row.rejected + 1) % vocabulary) for row in rows]
    device = scorer.head.weight.device
    of_rows, of_other_chosen, of_other_rejected = (
        torch.stack(scorer(pack(each).to(device)), 1).cpu().numpy() for each in (rows, other_chosen, other_rejected)
    )
    found_N2 = np.stack([of_other_rejected[:, 0], of_other_chosen[:, 1]], 1)
    if _has_experts(scorer.model):
        return exceeds_rounding(found_N2, of_rows, rows, scorer.head.weight.dtype)
    return not np.array_equal(found_N2, of_rows)


def _has_experts(model: PreTrainedModel) -> bool:
    """Whether a token's products depend on which experts it and others are sent to."""
    config = model.config.get_text_config().to_dict()  # the names of some models' weights do not say it
    return share_of_experts(config) < 1 or any(EXPERTS in name for name, _ in model.named_parameters())


def exceeds_rounding(logps_N2: np.ndarray, naive_N2: np.ndarray, rows: Sequence[TokenPair], dtype: torch.dtype) -> bool:
    """Whether log-probs differ from naive ones by more than the rounding of two passes in this dtype explains.

    Rounding errors of tokens add up like the root of their number.
    """
    lengths_N2 = np.array([(len(row.chosen), len(row.rejected)) for row in rows])
    return not (np.abs(logps_N2 - naive_N2) <= ROUNDING[dtype] * np.sqrt(lengths_N2)).all()


def naive_logprobs(model: PreTrainedModel, row: TokenPair) -> ChosenRejected:
    """The two summed log-probs from the model's own forward pass, attention and logits, one sequence at a time.

    Slow and simple. The audit and the tests compare packed log-probs with these.
    """
    weights = row.weights or (np.ones(len(row.chosen)), np.ones(len(row.rejected)))
    return ChosenRejected(*(_naive(model, row.prompt, *of) for of in zip(row.ids[1:], weights, strict=True)))


def _naive(model: PreTrainedModel, prompt: np.ndarray, response: np.ndarray, weights: np.ndarray) -> Tensor:
    tokens_T = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64)).to(model.device)
    with backends.own_attention(model):
        logits_TV = model(input_ids=tokens_T[None], use_cache=False).logits[0].float()
    logps_TV = logits_TV.log_softmax(-1)[len(prompt) - 1 : -1]
    logps_R = logps_TV.gather(1, tokens_T[len(prompt) :, None])[:, 0]
    return (logps_R * torch.from_numpy(weights).to(logps_R)).sum()


def score(
    scorer: nn.Module,
    rows: Sequence[TokenPair],
    tokens_per_pack: int,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Summed log-probs [N, 2], fp32, of the chosen and the rejected responses, in the order of the rows.

    `scorer` is a Scorer, or the engine's wrapper of one. It runs in eval mode and without gradients. The packs depend
    on the rows alone; the ranks share them. `progress` is called with the number of pairs of each finished pack.
    """
    device, training = next(scorer.parameters()).device, scorer.training
    logps_N2 = torch.zeros(len(rows), 2)
    packs = scoring_packs(rows, tokens_per_pack)
    packs += [[]] * (-len(packs) % distributed.world_size())  # every rank must run the same number of packs
    scorer.eval()
    with torch.no_grad():
        for members in packs[distributed.rank() :: distributed.world_size()]:
            both = scorer(pack([rows[i] for i in members]).to(device))
            logps_N2[members] = torch.stack(both, 1).cpu()
            if progress:
                progress(len(members))
    scorer.train(training)
    return distributed.total(logps_N2.to(device)).cpu().numpy()
