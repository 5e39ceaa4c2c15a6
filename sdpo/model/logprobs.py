"""Computes summed response log-probabilities log pi(y|x): packed for training and scoring, naively to check them.

The full [tokens, vocabulary] tensor of logits is never built: the head works on tiles of rows.

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
from sdpo.model.packing import MIN_ROWS, Pack, pack, scoring_packs
from sdpo.types import ChosenRejected, TokenPair

TILE_BYTES = {"cpu": 2**24, "cuda": 2**29}  # of the fp32 logits of one tile
# If all logits of a pack take at most this many bytes, they are kept for the backward pass; else they are recomputed.
KEPT_BYTES = {"cpu": 2**27, "cuda": 2**30}

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


class Head(nn.Module):
    """The model's own vocabulary projection. Returns only the log-probabilities of given tokens.

    It owns the projection's parameters, because DeepSpeed ZeRO-3 gathers a parameter for the module that owns it. It
    is called once per forward pass, whatever the number of tiles.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        projection, config = model.get_output_embeddings(), model.config.get_text_config()
        if type(projection) is not nn.Linear:
            raise UserError(
                f"{type(model).__name__}'s output projection is a {type(projection).__name__}, not a plain linear "
                "layer: leave it out of adapters and quantisation"
            )
        self.weight, self.bias = projection.weight, projection.bias
        self.scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1)
        self.softcap = getattr(config, "final_logit_softcapping", None)

    def forward(self, hidden_RH: Tensor, targets_R: Tensor) -> Tensor:
        """Log-probs [R], fp32, of the targets after the hidden states [R, H]."""
        return _LogProbs.apply(hidden_RH, self.weight, self.bias, targets_R, self.scale, self.softcap)


class _LogProbs(torch.autograd.Function):
    """Linear layer, soft cap, log-softmax and gather, one tile at a time in the forward and the backward pass."""

    @staticmethod
    def forward(ctx, hidden_RH, weight_VH, bias_V, targets_R, scale, softcap):
        ctx.save_for_backward(hidden_RH, weight_VH, bias_V, targets_R)
        ctx.scale, ctx.softcap, ctx.kept = scale, softcap, []
        num_bytes = 4 * len(targets_R) * len(weight_VH)
        # The gradient of a soft cap needs the logits, but the log-probs overwrite them: with a soft cap, recompute.
        keep = any(ctx.needs_input_grad) and softcap is None and num_bytes <= KEPT_BYTES[hidden_RH.device.type]
        # Allocate the result first: small tensors allocated between tiles would stop the allocator from reusing memory.
        logps_R = torch.empty(len(targets_R), dtype=torch.float32, device=hidden_RH.device)
        for tile in _tiles(hidden_RH, weight_VH):
            logps_RV = _log_softmax_(_logits(hidden_RH[tile], weight_VH, bias_V, scale, softcap))
            logps_R[tile] = logps_RV.gather(1, targets_R[tile, None])[:, 0]
            if keep:
                ctx.kept.append(logps_RV)
            del logps_RV
        return logps_R

    @staticmethod
    def backward(ctx, grad_R):
        hidden_RH, weight_VH, bias_V, targets_R = ctx.saved_tensors
        grad_RH = torch.empty_like(hidden_RH)
        grad_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_V = torch.zeros_like(bias_V, dtype=torch.float32) if bias_V is not None else None
        for i, tile in enumerate(_tiles(hidden_RH, weight_VH)):
            if ctx.kept:
                logps_RV, ctx.kept[i] = ctx.kept[i], None
            else:
                logits_RV = _logits(hidden_RH[tile], weight_VH, bias_V, ctx.scale, ctx.softcap)
                cap_slope_RV = None if ctx.softcap is None else 1 - (logits_RV / ctx.softcap) ** 2
                logps_RV = _log_softmax_(logits_RV)
            grad_R1 = grad_R[tile, None] * ctx.scale
            grad_RV = logps_RV.exp_().mul_(-grad_R1).scatter_add_(1, targets_R[tile, None], grad_R1)
            if ctx.softcap is not None:
                grad_RV *= cap_slope_RV
            if grad_V is not None:
                grad_V += grad_RV.sum(0)
            grad_RV = grad_RV.to(weight_VH.dtype)
            grad_RH[tile] = grad_RV @ weight_VH
            if grad_VH is not None:
                _add_product(grad_VH, grad_RV.T, hidden_RH[tile])
            del logps_RV, grad_RV
        grad_VH = grad_VH if grad_VH is None else grad_VH.to(weight_VH.dtype)
        grad_V = grad_V if grad_V is None else grad_V.to(bias_V.dtype)
        return grad_RH, grad_VH, grad_V, None, None, None


def _tiles(hidden_RH: Tensor, weight_VH: Tensor) -> list[slice]:
    """Slices of rows of about equal size, each with at least MIN_ROWS rows (see packing.py)."""
    rows = max(MIN_ROWS, TILE_BYTES[hidden_RH.device.type] // (4 * len(weight_VH)))
    num_tiles = max(1, len(hidden_RH) // rows)
    ends = [len(hidden_RH) * i // num_tiles for i in range(num_tiles + 1)]
    return [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]


def _logits(hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """The model's logits [R, V], fp32: the product in the weights' precision, scale and soft cap in fp32."""
    logits_RV = nn.functional.linear(hidden_RH, weight_VH, bias_V).float()
    if scale != 1:
        logits_RV *= scale
    return logits_RV if softcap is None else logits_RV.div_(softcap).tanh_().mul_(softcap)


def _log_softmax_(logits_RV: Tensor) -> Tensor:
    """Log-softmax of each row in place, because allocating a second tensor would take as long as the arithmetic."""
    return torch.log_softmax(logits_RV, -1, out=logits_RV)


def _add_product(total_VH: Tensor, left_VR: Tensor, right_RH: Tensor) -> None:
    """Add a matrix product to an fp32 sum; in place, without a temporary, if the factors are fp32 as well."""
    if left_VR.dtype == torch.float32:
        total_VH.addmm_(left_VR, right_RH)
    else:
        total_VH += left_VR @ right_RH


class Scorer(nn.Module):
    """A causal language model (`.model`) whose forward pass takes a pack and returns log-probs.

    `attention` is auto, sdpa, varlen, flex or plain. Raises UserError, which names the model, if the packed log-probs
    differ from those of the model's own forward pass in a check of sequences of up to `longest` tokens.
    """

    def __init__(self, model: PreTrainedModel, attention: str = "auto", longest: int = 1024):
        super().__init__()
        if model.get_decoder() is model:
            raise UserError(f"{type(model).__name__} has no decoder apart from its head, and cannot be scored here")
        self.model, self.head, self.attention = model, Head(model), attention
        if attention != "plain":
            backends.share_prompts(model)
        self.decode = model.get_decoder().__call__  # a bound method: a submodule would register its parameters twice
        self.reshapes_scores = backends.reshapes_scores(model)
        self.longest_packed = rotary.longest_with_fixed_frequencies(model.config.get_text_config())
        rotary.forget_lengths(model)
        self.train(model.training)
        check_packing(self, longest)

    @property
    def backend(self) -> str:
        """The attention backend for the model's present device and dtype."""
        weight = self.head.weight
        return backends.choose_backend(self.attention, weight.device, weight.dtype, self.reshapes_scores)

    def compile_decoder(self) -> None:
        """Let torch.compile build one graph, valid for all lengths, of everything between two attentions.

        The model itself is not compiled: generation and the naive check use it as it is.
        """
        backends.leave_out_of_graphs()
        self.decode = torch.compile(self.decode, dynamic=True)

    def forward(self, pack: Pack) -> ChosenRejected:
        """Summed log-probs [B], fp32, in nats, of the chosen and the rejected responses; 0 for an empty response.

        If the rows have weights of their tokens, a sum is that of weight * log-prob. If rotary frequencies depend on
        the length of a sequence of this pack, each sequence has a pass of its own.
        """
        if pack.longest <= self.longest_packed:
            return self._packed(pack)
        logps_2B = torch.cat([self._packed(alone).chosen for alone in pack.apart()])
        return ChosenRejected(*logps_2B.view(-1, 2).unbind(1))

    def _packed(self, pack: Pack) -> ChosenRejected:
        hidden_TH = self._hidden(pack)
        logps_R = self.head(hidden_TH.index_select(0, pack.rows_R), pack.targets_R)
        if pack.weights_R is not None:
            logps_R = logps_R * pack.weights_R
        # Sum in fp64, whose rounding is far below that of the terms. The last two sums are the closing pair's.
        sums = logps_R.new_zeros(2 * pack.num_pairs + 2, dtype=torch.float64)
        sums = sums.index_add(0, pack.branches_R, logps_R.double())
        return ChosenRejected(*sums[: 2 * pack.num_pairs].float().view(-1, 2).unbind(1))

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
    on rotary frequencies change), but not longer than `longest`, which no sequence that is scored exceeds.
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
        except (AttributeError, TypeError) as error:  # of model code that computes with the mask
            raise UserError(backends.refusal(scorer.model, f"its attention reads its mask ({error})")) from error
        naive = torch.stack([torch.stack(naive_logprobs(scorer.model, row)) for row in rows])
    scorer.train(training)
    if exceeds_rounding(packed.cpu().numpy(), naive.cpu().numpy(), rows, scorer.head.weight.dtype):
        reason = f"its log-probs would be {packed.tolist()}, not {naive.tolist()}"
        raise UserError(backends.refusal(scorer.model, reason))


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
