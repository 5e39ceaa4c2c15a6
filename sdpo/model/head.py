"""The head: log-probs of given tokens from hidden states. It works on tiles of rows.

The full [tokens, vocabulary] tensor of logits is only built if memory has room for it.

Shapes: R response tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sdpo import distributed
from sdpo.errors import UserError
from sdpo.model.packing import MIN_ROWS

TILE_BYTES = {"cpu": 2**24, "cuda": 2**29}  # of the fp32 logits of one tile
# Of logits that are kept for the backward pass on a CPU, and on a GPU that other runs share.
KEPT_BYTES, KEPT_BESIDE_OTHERS = 2**27, 2**30


Distribution = Callable[[slice], Tensor]  # log-probs [R, V] of a slice of rows, fp32


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

    def forward(self, hidden_RH: Tensor, targets_R: Tensor, other: Distribution | None = None) -> tuple[Tensor, ...]:
        """Log-probs [R], fp32, of the targets after the hidden states [R, H].

        If there is another distribution of the same tokens, KL(other || this) [R] comes second, in nats.
        """
        return _LogProbs.apply(hidden_RH, self.weight, self.bias, targets_R, self.scale, self.softcap, other)

    def distribution(self, hidden_RH: Tensor) -> Distribution:
        """The log-probs [R, V] of all tokens after the hidden states, without gradients, one tile at a time."""
        args = (self.weight, self.bias, self.scale, self.softcap)
        return lambda tile: _log_softmax_(_logits(hidden_RH[tile], *args))


class _LogProbs(torch.autograd.Function):
    """Linear layer, soft cap, log-softmax and gather, one tile at a time in the forward and the backward pass."""

    @staticmethod
    def forward(ctx, hidden_RH, weight_VH, bias_V, targets_R, scale, softcap, other):
        ctx.save_for_backward(hidden_RH, weight_VH, bias_V, targets_R)
        ctx.scale, ctx.softcap, ctx.other, ctx.kept = scale, softcap, other, []
        num_bytes = 4 * len(targets_R) * len(weight_VH)
        # The gradient of a soft cap needs the logits, but the log-probs overwrite them: with a soft cap, recompute.
        keep = any(ctx.needs_input_grad) and softcap is None and num_bytes <= _room_for_logits(weight_VH)
        # Allocate the result first: small tensors allocated between tiles would stop the allocator from reusing memory.
        logps_R = torch.empty(len(targets_R), dtype=torch.float32, device=hidden_RH.device)
        kl_R = torch.empty_like(logps_R)
        for tile in _tiles(hidden_RH, weight_VH):
            logps_RV = _log_softmax_(_logits(hidden_RH[tile], weight_VH, bias_V, scale, softcap))
            logps_R[tile] = logps_RV.gather(1, targets_R[tile, None])[:, 0]
            if other:
                other_RV = other(tile)
                kl_R[tile] = (other_RV - logps_RV).mul_(other_RV.exp_()).sum(-1)
                del other_RV
            if keep:
                ctx.kept.append(logps_RV)
            del logps_RV
        return (logps_R, kl_R) if other else (logps_R,)

    @staticmethod
    def backward(ctx, grad_R, *grad_of_kl):
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
            probs_RV = logps_RV.exp_()
            if ctx.other:  # the slope of KL(other || this) in the logits is this - other
                kl_R1 = grad_of_kl[0][tile, None] * ctx.scale
                grad_RV = probs_RV.mul_(kl_R1 - grad_R1).sub_(ctx.other(tile).exp_().mul_(kl_R1))
            else:
                grad_RV = probs_RV.mul_(-grad_R1)
            grad_RV.scatter_add_(1, targets_R[tile, None], grad_R1)
            if ctx.softcap is not None:
                grad_RV *= cap_slope_RV
            if grad_V is not None:
                grad_V += grad_RV.sum(0)
            grad_RV = grad_RV.to(weight_VH.dtype)
            grad_RH[tile] = grad_RV @ weight_VH
            if grad_VH is not None:
                _add_product(grad_VH, grad_RV.T, hidden_RH[tile])
            del logps_RV, probs_RV, grad_RV
        grad_VH = grad_VH if grad_VH is None else grad_VH.to(weight_VH.dtype)
        grad_V = grad_V if grad_V is None else grad_V.to(bias_V.dtype)
        return grad_RH, grad_VH, grad_V, None, None, None, None


def _tiles(hidden_RH: Tensor, weight_VH: Tensor) -> list[slice]:
    """Slices of rows of about equal size, each with at least MIN_ROWS rows (see packing.py)."""
    rows = max(MIN_ROWS, TILE_BYTES[hidden_RH.device.type] // (4 * len(weight_VH)))
    num_tiles = max(1, len(hidden_RH) // rows)
    ends = [len(hidden_RH) * i // num_tiles for i in range(num_tiles + 1)]
    return [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]


def _room_for_logits(weight_VH: Tensor) -> int:
    """How many bytes of logits are kept for the backward pass; if a pack has more, they are recomputed, bit for bit.

    On a GPU this is half of the memory that is free beside the weight's gradient.
    """
    device = weight_VH.device
    if device.type == "cpu":
        return KEPT_BYTES
    if distributed.shares_device():
        return KEPT_BESIDE_OTHERS
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free - 6 * weight_VH.numel()) // 2  # the gradient: in fp32, and in 16 bits


def _logits(hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """The model's logits [R, V], fp32: the product in the weights' precision, scale and soft cap in fp32.

    On a CPU the sums of a product of 16 bits are rounded to 16 bits; on a GPU they stay in fp32.
    """
    if _has_fp32_sums(hidden_RH):
        logits_RV = torch.mm(hidden_RH, weight_VH.T, out_dtype=torch.float32)
        if bias_V is not None:
            logits_RV += bias_V
    else:
        logits_RV = nn.functional.linear(hidden_RH, weight_VH, bias_V).float()
    if scale != 1:
        logits_RV *= scale
    return logits_RV if softcap is None else logits_RV.div_(softcap).tanh_().mul_(softcap)


def _log_softmax_(logits_RV: Tensor) -> Tensor:
    """Log-softmax of each row in place, because allocating a second tensor would take as long as the arithmetic."""
    return torch.log_softmax(logits_RV, -1, out=logits_RV)


def _add_product(total_VH: Tensor, left_VR: Tensor, right_RH: Tensor) -> None:
    """Add a matrix product to an fp32 sum; without a temporary, except for factors of 16 bits on a CPU."""
    if left_VR.dtype == torch.float32:
        total_VH.addmm_(left_VR, right_RH)
    elif _has_fp32_sums(left_VR):
        torch.addmm(total_VH, left_VR, right_RH, out_dtype=torch.float32, out=total_VH)
    else:
        total_VH += left_VR @ right_RH


def _has_fp32_sums(factor: Tensor) -> bool:
    """Whether PyTorch returns products of such a tensor in fp32 although its elements have 16 bits."""
    return factor.is_cuda and factor.dtype != torch.float32
