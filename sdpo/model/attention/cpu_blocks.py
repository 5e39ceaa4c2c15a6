"""Causal attention on a CPU in blocks of query rows, so that the scores of a block stay in the cache.

PyTorch's fused kernel takes about 1.5 times as long, and needs a mask if there are fewer queries than keys.

Shapes: N sequences of L tokens, of which the last M have queries; H heads; B = N times H; D head dimension; R query
rows and K keys of a block.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

ROWS = 64  # of a block: enough for matrix products at full speed, few enough for the cache
KEPT_BYTES = 2**24  # if a call's probabilities take at most this many bytes, they are kept for the backward pass


def attend_in_blocks(
    query_NHMD: Tensor, key_NHLD: Tensor, value_NHLD: Tensor, scale: float | None, window: int | None
) -> Tensor:
    """Attention [N, H, M, D] of the last M tokens to all L. Keys and values may have fewer heads. Computes in fp32."""
    group = query_NHMD.shape[1] // key_NHLD.shape[1]
    if group > 1:
        key_NHLD, value_NHLD = (x.repeat_interleave(group, dim=1) for x in (key_NHLD, value_NHLD))
    query_BMD, key_BLD, value_BLD = (x.flatten(0, 1) for x in (query_NHMD, key_NHLD, value_NHLD))
    scale = query_BMD.shape[-1] ** -0.5 if scale is None else scale
    return _Blocks.apply(query_BMD, key_BLD, value_BLD, scale, window).unflatten(0, query_NHMD.shape[:2])


def visible_keys(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Boolean mask [M, L]: each of the last M tokens sees itself and the window - 1 tokens before it."""
    positions_L = torch.arange(num_keys, device=device)
    distance_ML = positions_L[num_keys - num_queries :, None] - positions_L
    return (distance_ML >= 0) & (distance_ML < (num_keys if window is None else window))


class _Blocks(torch.autograd.Function):
    """Softmax attention. The backward pass recomputes the probabilities if they were too large to keep."""

    @staticmethod
    def forward(ctx, query_BMD, key_BLD, value_BLD, scale, window):
        ctx.scale, ctx.window, ctx.kept = scale, window, []
        query, key, value = query_BMD.float() * scale, key_BLD.float(), value_BLD.float()
        num_bytes = 4 * query[..., 0].numel() * key.shape[1]
        keep = any(ctx.needs_input_grad) and num_bytes <= KEPT_BYTES
        outputs = []
        for rows, keys in _blocks(query.shape[1], key.shape[1], window):
            probs_BRK = _probabilities(query[:, rows], key[:, keys], window)
            outputs.append(torch.bmm(probs_BRK, value[:, keys]))
            if keep:
                ctx.kept.append(probs_BRK)
        output_BMD = torch.cat(outputs, 1)
        ctx.save_for_backward(query_BMD, key_BLD, value_BLD, output_BMD)
        return output_BMD.to(query_BMD.dtype)

    @staticmethod
    def backward(ctx, grad_BMD):
        saved = ctx.saved_tensors
        query, key, value, output_BMD = (x.float() for x in saved)
        query, grad_BMD = query * ctx.scale, grad_BMD.float()
        mean_BM1 = (grad_BMD * output_BMD).sum(-1, keepdim=True)
        grad_queries, grad_key, grad_value = [], torch.zeros_like(key), torch.zeros_like(value)
        for i, (rows, keys) in enumerate(_blocks(query.shape[1], key.shape[1], ctx.window)):
            probs_BRK = ctx.kept[i] if ctx.kept else _probabilities(query[:, rows], key[:, keys], ctx.window)
            grad_value[:, keys].baddbmm_(probs_BRK.mT, grad_BMD[:, rows])
            grad_scores_BRK = torch.bmm(grad_BMD[:, rows], value[:, keys].mT).sub_(mean_BM1[:, rows]).mul_(probs_BRK)
            grad_queries.append(torch.bmm(grad_scores_BRK, key[:, keys]))
            grad_key[:, keys].baddbmm_(grad_scores_BRK.mT, query[:, rows])
        grads = (torch.cat(grad_queries, 1).mul_(ctx.scale), grad_key, grad_value)
        return *(grad.to(x.dtype) for grad, x in zip(grads, saved[:3], strict=True)), None, None


def _blocks(num_queries: int, num_keys: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Blocks of about equally many query rows, each with the keys that any of its rows sees."""
    size = -(-num_queries // -(-num_queries // ROWS))
    before = num_keys - num_queries
    for start in range(0, num_queries, size):
        end = min(start + size, num_queries)
        first = 0 if window is None else max(0, before + start - window + 1)
        yield slice(start, end), slice(first, before + end)


def _probabilities(query_BRD: Tensor, key_BKD: Tensor, window: int | None) -> Tensor:
    """Softmax over the keys. The last R keys are those of the queries' own tokens."""
    scores_BRK, num_rows = torch.bmm(query_BRD, key_BKD.mT), query_BRD.shape[1]
    # Without a window, every row sees all keys before the block, so only the last R keys need the mask.
    masked_BRK = scores_BRK[..., -num_rows:] if window is None else scores_BRK
    masked_BRK += _additive_mask(num_rows, masked_BRK.shape[-1], window)
    return scores_BRK.softmax(-1)


@lru_cache(maxsize=256)
def _additive_mask(num_queries: int, num_keys: int, window: int | None) -> Tensor:
    """The mask [M, L] to add to scores: 0 if the query sees the key, else minus infinity."""
    visible_ML = visible_keys(num_queries, num_keys, window, torch.device("cpu"))
    return torch.zeros(num_queries, num_keys).masked_fill_(~visible_ML, float("-inf"))
