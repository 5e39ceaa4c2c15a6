"""Token streams -> summed response log-probabilities log pi(y|x); the reference pass; the naive check on both.

The [tokens, vocabulary] tensor of logits never exists: the head works in tiles of rows.

Shapes: B pairs, N rows, T tokens of the stream, R response tokens, H hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sdpo import distributed
from sdpo.errors import UserError
from sdpo.model.attention import interface as backends
from sdpo.model.packing import MIN_ROWS, Pack, in_order, pack
from sdpo.types import ChosenRejected, TokenPair

# Bytes of fp32 logits: of one tile, and of all tiles of a pack, up to which they are kept for the backward pass
# (above it they are computed again).
TILE_BYTES = {"cpu": 2**24, "cuda": 2**29}
KEPT_BYTES = {"cpu": 2**27, "cuda": 2**30}


class Head(nn.Module):
    """The model's own vocabulary projection, as the log-probability of given tokens only.

    It holds the projection's parameters itself, because DeepSpeed ZeRO-3 gathers a parameter for the module that
    owns it; one call a forward pass, however many tiles.
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
    """Linear layer, soft cap, log-softmax and gather, tile by tile in both directions."""

    @staticmethod
    def forward(ctx, hidden_RH, weight_VH, bias_V, targets_R, scale, softcap):
        ctx.save_for_backward(hidden_RH, weight_VH, bias_V, targets_R)
        ctx.scale, ctx.softcap, ctx.kept = scale, softcap, []
        num_bytes = 4 * len(targets_R) * len(weight_VH)
        # The slope of a soft cap needs the logits themselves, over which the log-probs are written.
        keep = any(ctx.needs_input_grad) and softcap is None and num_bytes <= KEPT_BYTES[hidden_RH.device.type]
        # Results are made first: small ones made between tiles would stop the allocator from reusing a tile's memory.
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
                bend_RV = None if ctx.softcap is None else 1 - (logits_RV / ctx.softcap) ** 2
                logps_RV = _log_softmax_(logits_RV)
            weight_R1 = grad_R[tile, None] * ctx.scale
            slope_RV = logps_RV.exp_().mul_(-weight_R1).scatter_add_(1, targets_R[tile, None], weight_R1)
            if ctx.softcap is not None:
                slope_RV *= bend_RV
            if grad_V is not None:
                grad_V += slope_RV.sum(0)
            slope_RV = slope_RV.to(weight_VH.dtype)
            grad_RH[tile] = slope_RV @ weight_VH
            if grad_VH is not None:
                _add_product(grad_VH, slope_RV.T, hidden_RH[tile])
            del logps_RV, slope_RV
        grad_VH = grad_VH if grad_VH is None else grad_VH.to(weight_VH.dtype)
        grad_V = grad_V if grad_V is None else grad_V.to(bias_V.dtype)
        return grad_RH, grad_VH, grad_V, None, None, None


def _tiles(hidden_RH: Tensor, weight_VH: Tensor) -> list[slice]:
    """Slices of rows of about equal size, at least MIN_ROWS each (see packing)."""
    rows = max(MIN_ROWS, TILE_BYTES[hidden_RH.device.type] // (4 * len(weight_VH)))
    num_tiles = max(1, len(hidden_RH) // rows)
    ends = [len(hidden_RH) * i // num_tiles for i in range(num_tiles + 1)]
    return [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]


def _logits(rows_RH, weight_VH, bias_V, scale, softcap) -> Tensor:
    """The model's logits [R, V] of some rows: product in the weights' precision, the rest in fp32."""
    logits_RV = nn.functional.linear(rows_RH, weight_VH, bias_V).float()
    if scale != 1:
        logits_RV *= scale
    return logits_RV if softcap is None else logits_RV.div_(softcap).tanh_().mul_(softcap)


def _log_softmax_(logits_RV: Tensor) -> Tensor:
    """Log-softmax of each row, written over the logits: a second tensor would cost as much again as the arithmetic."""
    return torch.log_softmax(logits_RV, -1, out=logits_RV)


def _add_product(total_VH: Tensor, left_VR: Tensor, right_RH: Tensor) -> None:
    """Add a product to an fp32 sum, in place where the product is fp32 as well."""
    if left_VR.dtype == torch.float32:
        total_VH.addmm_(left_VR, right_RH)
    else:
        total_VH += left_VR @ right_RH


class Scorer(nn.Module):
    """A causal language model (`.model`) whose forward pass takes a pack and returns log-probs.

    `attention`: auto | sdpa | varlen | flex | plain. Raises UserError, naming the model, where its packed
    log-probs differ from its own.
    """

    def __init__(self, model: PreTrainedModel, attention: str = "auto"):
        super().__init__()
        if model.get_decoder() is model:
            raise UserError(f"{type(model).__name__} has no decoder apart from its head, and cannot be scored here")
        self.model, self.head, self.attention = model, Head(model), attention
        if attention != "plain":
            backends.share_prompts(model)
        self.decode = model.get_decoder().__call__  # bound, so that no parameter is here twice
        self.reshaped = backends.reshapes_scores(model)
        self.train(model.training)
        _check(self)

    @property
    def backend(self) -> str:
        """The attention backend that packs run with, where the model is now."""
        weight = self.head.weight
        return backends.choose(self.attention, weight.device, weight.dtype, self.reshaped)

    def compile_decoder(self) -> None:
        """Let torch.compile make one graph for all lengths of what lies between two attentions.

        The model itself stays as it is, for generation and for the check with its own forward pass.
        """
        backends.leave_out_of_graphs()
        self.decode = torch.compile(self.decode, dynamic=True)

    def forward(self, pack: Pack) -> ChosenRejected:
        """Summed log-probs [B], fp32, in nats, of the chosen and the rejected responses (0 where one is empty)."""
        hidden_TH = self._hidden(pack)
        logps_R = self.head(hidden_TH.index_select(0, pack.rows_R), pack.targets_R)
        # Sums in fp64: their rounding is then far below that of the terms.
        sums = logps_R.new_zeros(2 * pack.num_pairs + 2, dtype=torch.float64)
        sums = sums.index_add(0, pack.branches_R, logps_R.double())
        return ChosenRejected(*sums[: 2 * pack.num_pairs].float().view(-1, 2).unbind(1))

    def _hidden(self, pack: Pack) -> Tensor:
        """Last hidden states of the stream [T, H], the head not yet applied."""
        name = self.backend
        if name != "plain":
            return self._run(pack.tokens_T, pack.positions_T, packed=backends.BACKENDS[name](pack))
        sequences = zip(pack.keys_K.split(pack.lengths_S), pack.own_S, strict=True)
        return torch.cat([self._run(pack.tokens_T[at], pack.positions_T[at])[-own:] for at, own in sequences])

    def _run(self, tokens_T: Tensor, positions_T: Tensor, **extra) -> Tensor:
        output = self.decode(input_ids=tokens_T[None], position_ids=positions_T[None], use_cache=False, **extra)
        return output.last_hidden_state[0]


def _check(scorer: Scorer) -> None:
    """Compare packed with plain log-probs on a few tokens: what a model does with attention or logits beyond what is
    known here (ALiBi, recurrence, another scaling) shows in them."""
    rows = [
        TokenPair("", *(np.arange(n, dtype=np.int32) % 3 + 1 for n in lengths)) for lengths in [(5, 4, 6), (1, 7, 2)]
    ]
    training = scorer.training
    scorer.eval()
    with torch.no_grad():
        packed = torch.stack(scorer(pack(rows).to(scorer.head.weight.device)), 1)
        naive = torch.stack([torch.stack(naive_logprobs(scorer.model, row)) for row in rows])
    scorer.train(training)
    tolerance = 1e-4 if packed.dtype == scorer.head.weight.dtype else 2e-2
    if not torch.allclose(packed, naive, rtol=tolerance):
        reason = f"its log-probs would be {packed.tolist()}, not {naive.tolist()}"
        raise UserError(backends.refusal(scorer.model, reason))


def naive_logprobs(model: PreTrainedModel, row: TokenPair) -> ChosenRejected:
    """The same two sums from the model's own forward pass, attention and logits, one sequence at a time.

    Slow and obvious: what the audit and the tests compare with.
    """
    return ChosenRejected(*(_naive(model, row.prompt, response) for response in (row.chosen, row.rejected)))


def _naive(model: PreTrainedModel, prompt: np.ndarray, response: np.ndarray) -> Tensor:
    tokens_T = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64)).to(model.device)
    with backends.own_attention(model):
        logits_TV = model(input_ids=tokens_T[None], use_cache=False).logits[0].float()
    logps_TV = logits_TV.log_softmax(-1)[len(prompt) - 1 : -1]
    return logps_TV.gather(1, tokens_T[len(prompt) :, None]).sum()


def score(
    scorer: nn.Module,
    rows: Sequence[TokenPair],
    tokens_per_pack: int,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """The reference pass: summed log-probs [N, 2], fp32, chosen and rejected, in the order of the rows.

    In eval mode and without gradients, in packs whose make-up depends on the rows alone and which the ranks divide.
    `progress` is called with the number of pairs of each finished pack.
    """
    device, training = next(scorer.parameters()).device, scorer.training
    logps_N2 = torch.zeros(len(rows), 2)
    packs = in_order(rows, tokens_per_pack)
    packs += [[]] * (-len(packs) % distributed.world_size())  # every rank runs the same number
    scorer.eval()
    with torch.no_grad():
        for members in packs[distributed.rank() :: distributed.world_size()]:
            both = scorer(pack([rows[i] for i in members]).to(device))
            logps_N2[members] = torch.stack(both, 1).cpu()
            if progress:
                progress(len(members))
    scorer.train(training)
    return distributed.total(logps_N2.to(device)).cpu().numpy()
