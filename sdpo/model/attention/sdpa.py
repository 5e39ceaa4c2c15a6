"""Attention on any device, sequence by sequence: blocks of rows on a CPU, PyTorch's fused kernel elsewhere.

Shapes: T tokens of the stream, S sequences, G gathered tokens, N sequences of a group, L tokens of each, of which the
last M have queries, H query heads (keys and values may have fewer), D head dimension.
"""

from collections import defaultdict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sdpo.model.attention.cpu_blocks import attend_in_blocks, visible_keys
from sdpo.model.packing import Pack

SHORT = 64  # sequences of up to this many tokens are padded, so that more of them share a call


class Rule(NamedTuple):
    """How a layer's attention differs from plain causal attention."""

    scale: float | None  # None: one over the square root of the head dimension
    window: int | None  # a token sees itself and the window - 1 tokens before it
    softcap: float | None
    sinks_H: Tensor | None  # one extra logit per head, which takes part in the softmax and has no value
    dropout: float


class Sdpa:
    """One batched call per group of equally long sequences. Only tokens that belong to one sequence alone have queries.

    Sequences of at most SHORT tokens are padded to a multiple of 8 by repeating their last token, and all their tokens
    have queries. Causal attention never sees the padding. The padded length depends on the sequence alone, so its
    result does not depend on the pack.
    """

    def __init__(self, pack: Pack):
        groups = defaultdict(list)
        for s, (length, own) in enumerate(zip(pack.lengths_S, pack.own_S, strict=True)):
            padded = -(-length // 8) * 8
            groups[(length, own) if length > SHORT else (padded, padded)].append(s)
        lengths_S, own_S = torch.tensor(pack.lengths_S), torch.tensor(pack.own_S)
        starts_S = torch.tensor([0, *pack.lengths_S]).cumsum(0)
        self.shapes, keys, queries, is_own = [], [], [], []
        for (length, num_queries), members in groups.items():
            column_L, lengths_N1 = torch.arange(length), lengths_S[members, None]
            keys_NL = starts_S[members, None] + column_L.minimum(lengths_N1 - 1)
            is_own_NL = (column_L >= lengths_N1 - own_S[members, None]) & (column_L < lengths_N1)
            keys.append(keys_NL.flatten())
            queries.append(keys_NL[:, length - num_queries :].flatten())
            is_own.append(is_own_NL[:, length - num_queries :].flatten())
            self.shapes.append((len(members), num_queries, length))
        device = pack.keys_K.device
        self.keys_G, self.queries_G = (pack.keys_K[torch.cat(at).to(device)] for at in (keys, queries))
        own_T = torch.cat(is_own).nonzero().flatten().to(device)
        self.scatter_T = torch.empty_like(own_T)
        self.scatter_T[self.queries_G[own_T]] = own_T

    def __call__(self, query_THD: Tensor, key_THD: Tensor, value_THD: Tensor, rule: Rule) -> Tensor:
        queries = query_THD.index_select(0, self.queries_G).split([n * m for n, m, _ in self.shapes])
        per_group = [n * length for n, _, length in self.shapes]
        keys, values = (x.index_select(0, self.keys_G).split(per_group) for x in (key_THD, value_THD))
        outputs = []
        for (num, *_), *group in zip(self.shapes, queries, keys, values, strict=True):
            query, key, value = (x.unflatten(0, (num, -1)).transpose(1, 2) for x in group)
            outputs.append(_causal(query, key, value, rule).transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, self.scatter_T)


def _causal(query_NHMD: Tensor, key_NHLD: Tensor, value_NHLD: Tensor, rule: Rule) -> Tensor:
    """Causal attention [N, H, M, D] of the last M tokens of equally long sequences."""
    num_queries, num_keys = query_NHMD.shape[2], key_NHLD.shape[2]
    if rule.softcap is not None or rule.sinks_H is not None:
        return _explicit(query_NHMD, key_NHLD, value_NHLD, rule)
    if query_NHMD.device.type == "cpu" and not rule.dropout:
        return attend_in_blocks(query_NHMD, key_NHLD, value_NHLD, rule.scale, rule.window)
    is_square = num_queries == num_keys and (rule.window is None or rule.window >= num_keys)
    return F.scaled_dot_product_attention(
        query_NHMD,
        key_NHLD,
        value_NHLD,
        attn_mask=None if is_square else visible_keys(num_queries, num_keys, rule.window, query_NHMD.device),
        is_causal=is_square,
        dropout_p=rule.dropout,
        scale=rule.scale,
        enable_gqa=query_NHMD.shape[1] != key_NHLD.shape[1],
    )


def _explicit(query_NHMD: Tensor, key_NHLD: Tensor, value_NHLD: Tensor, rule: Rule) -> Tensor:
    """Attention with soft cap and sinks, step by step. Its memory grows with the square of the length."""
    (num_queries, dim), num_keys = query_NHMD.shape[2:], key_NHLD.shape[2]
    group = query_NHMD.shape[1] // key_NHLD.shape[1]
    key_NHLD, value_NHLD = (x.repeat_interleave(group, dim=1) for x in (key_NHLD, value_NHLD))
    scores_NHML = query_NHMD @ key_NHLD.mT * (dim**-0.5 if rule.scale is None else rule.scale)
    if rule.softcap is not None:
        scores_NHML = rule.softcap * torch.tanh(scores_NHML / rule.softcap)
    visible_ML = visible_keys(num_queries, num_keys, rule.window, query_NHMD.device)
    scores_NHML = scores_NHML.float().masked_fill(~visible_ML, float("-inf"))
    if rule.sinks_H is not None:
        sinks_NHM1 = rule.sinks_H.float()[:, None, None].expand(*scores_NHML.shape[:3], 1)
        scores_NHML = torch.cat([scores_NHML, sinks_NHM1], dim=-1)
    probs_NHML = scores_NHML.softmax(-1)[..., :num_keys].to(value_NHLD.dtype)
    return F.dropout(probs_NHML, rule.dropout) @ value_NHLD
