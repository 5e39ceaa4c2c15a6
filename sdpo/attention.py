"""The attention that a shared prompt needs, one class per backend, behind transformers' attention interface.

Model code stays untouched: the pack's backend travels through the forward pass as the keyword argument `packed`
and arrives here with each layer's query, key and value. Every backend sees the same sequences; they differ in how.

Shapes: T tokens of the stream, S sequences, K tokens of all sequences, G gathered tokens, N sequences of a group,
L their length, H query heads (keys and values may have fewer), D head dimension.
"""

import inspect
from collections import defaultdict
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention import varlen
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from sdpo.packing import Pack

NAME = "sdpo"
CHOICES = ("auto", "sdpa", "varlen", "flex", "plain")


class Rule(NamedTuple):
    """What a layer asks of attention beyond causality."""

    scale: float | None
    window: int | None  # a token sees itself and the window - 1 tokens before it
    softcap: float | None
    sinks_H: Tensor | None  # one logit per head that takes part in the softmax and is then dropped
    dropout: float


class Sdpa:
    """Any device: sequences of equal length as one batched call of PyTorch's causal attention.

    Short sequences are filled up to a multiple of 8 tokens by repeating the last one: causal attention never looks
    that way, and the length depends on the sequence alone, so that its result does not depend on the pack.
    """

    def __init__(self, pack: Pack):
        starts_S, groups = torch.tensor([0, *pack.lengths_S]).cumsum(0), defaultdict(list)
        for s, length in enumerate(pack.lengths_S):
            groups[-(-length // 8) * 8 if length <= 64 else length].append(s)
        lengths_S, own_S = torch.tensor(pack.lengths_S), torch.tensor(pack.own_S)
        self.shapes, gather, is_own = [], [], []
        for length, members in groups.items():
            column_L, lengths_N1 = torch.arange(length), lengths_S[members, None]
            gather.append((starts_S[members, None] + column_L.minimum(lengths_N1 - 1)).flatten())
            is_own.append(((column_L >= lengths_N1 - own_S[members, None]) & (column_L < lengths_N1)).flatten())
            self.shapes.append((len(members), length))
        self.gather_G = pack.keys_K[torch.cat(gather).to(pack.keys_K.device)]
        own_T = torch.cat(is_own).nonzero().flatten().to(self.gather_G.device)
        self.scatter_T = torch.empty_like(own_T)
        self.scatter_T[self.gather_G[own_T]] = own_T

    def __call__(self, query_THD: Tensor, key_THD: Tensor, value_THD: Tensor, rule: Rule) -> Tensor:
        sizes = [n * length for n, length in self.shapes]
        gathered = (x.index_select(0, self.gather_G).split(sizes) for x in (query_THD, key_THD, value_THD))
        outputs = []
        for shape, *group in zip(self.shapes, *gathered, strict=True):
            query, key, value = (x.unflatten(0, shape).transpose(1, 2) for x in group)
            outputs.append(_causal(query, key, value, rule).transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, self.scatter_T)


def _causal(query_NHLD: Tensor, key_NHLD: Tensor, value_NHLD: Tensor, rule: Rule) -> Tensor:
    """Causal attention over sequences of one length."""
    length = query_NHLD.shape[2]
    mask_LL = None
    if rule.window is not None and rule.window < length:
        mask_LL = _band(length, rule.window, query_NHLD.device)
    if rule.softcap is not None or rule.sinks_H is not None:
        return _spelled_out(query_NHLD, key_NHLD, value_NHLD, mask_LL, rule)
    return F.scaled_dot_product_attention(
        query_NHLD,
        key_NHLD,
        value_NHLD,
        attn_mask=mask_LL,
        is_causal=mask_LL is None,
        dropout_p=rule.dropout,
        scale=rule.scale,
        enable_gqa=query_NHLD.shape[1] != key_NHLD.shape[1],
    )


def _band(length: int, window: int, device: torch.device) -> Tensor:
    at_L = torch.arange(length, device=device)
    back_LL = at_L[:, None] - at_L
    return (back_LL >= 0) & (back_LL < window)


def _spelled_out(query_NHLD, key_NHLD, value_NHLD, mask_LL, rule: Rule) -> Tensor:
    """Attention with soft cap and sinks, in memory that grows with the square of the length."""
    length, group = query_NHLD.shape[2], query_NHLD.shape[1] // key_NHLD.shape[1]
    key_NHLD, value_NHLD = (x.repeat_interleave(group, dim=1) for x in (key_NHLD, value_NHLD))
    scale = query_NHLD.shape[-1] ** -0.5 if rule.scale is None else rule.scale
    scores_NHLL = query_NHLD @ key_NHLD.mT * scale
    if rule.softcap is not None:
        scores_NHLL = rule.softcap * torch.tanh(scores_NHLL / rule.softcap)
    visible_LL = _band(length, length, query_NHLD.device) if mask_LL is None else mask_LL
    scores_NHLL = scores_NHLL.float().masked_fill(~visible_LL, float("-inf"))
    if rule.sinks_H is not None:
        sinks_NHL1 = rule.sinks_H.float()[:, None, None].expand(*scores_NHLL.shape[:3], 1)
        scores_NHLL = torch.cat([scores_NHLL, sinks_NHL1], dim=-1)
    probs_NHLL = scores_NHLL.softmax(-1)[..., :length].to(value_NHLD.dtype)
    return F.dropout(probs_NHLL, rule.dropout) @ value_NHLD


class Varlen:
    """CUDA, 16 bits: one FlashAttention call in which a rejected response queries its prompt's keys as well.

    Queries and keys of a sequence differ in number; causality is aligned at the bottom right (FlashAttention 2.1 on).
    """

    def __init__(self, pack: Pack):
        device = pack.keys_K.device
        self.keys_K, self.max_q, self.max_k = pack.keys_K, max(pack.own_S), max(pack.lengths_S)
        self.ends_q, self.ends_k = (
            torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
            for lengths in (pack.own_S, pack.lengths_S)
        )

    def __call__(self, query_THD: Tensor, key_THD: Tensor, value_THD: Tensor, rule: Rule) -> Tensor:
        if rule.softcap is not None or rule.sinks_H is not None or rule.dropout:
            raise ValueError("varlen attention has no soft cap, sinks or dropout: choose attention=sdpa")
        window = -1 if rule.window is None else rule.window - 1
        options = {"enable_gqa": query_THD.shape[1] != key_THD.shape[1], "num_splits": 1}
        return varlen.varlen_attn(
            query_THD,
            key_THD.index_select(0, self.keys_K),
            value_THD.index_select(0, self.keys_K),
            self.ends_q,
            self.ends_k,
            self.max_q,
            self.max_k,
            scale=rule.scale,
            window_size=(window, 0),
            **{name: value for name, value in options.items() if name in _varlen_parameters()},
        )


@lru_cache
def _varlen_parameters() -> frozenset[str]:
    """Its keyword arguments grew from one release of PyTorch to the next."""
    return frozenset(inspect.signature(varlen.varlen_attn).parameters)


class Flex:
    """CUDA: FlexAttention over the stream as it is, nothing gathered, with soft caps and sinks.

    On the CPU it has no backward pass.
    """

    def __init__(self, pack: Pack):
        own_S, lengths_S = torch.tensor(pack.own_S), torch.tensor(pack.lengths_S)
        prefix_S, ids_S = lengths_S - own_S, torch.arange(len(own_S))
        per_token = (ids_S, ids_S - (prefix_S > 0).int(), prefix_S)
        self.ids_T, self.parents_T, self.prefix_T = (
            x.repeat_interleave(own_S).to(pack.tokens_T.device) for x in per_token
        )
        self.positions_T, self.masks = pack.positions_T, {}

    def __call__(self, query_THD: Tensor, key_THD: Tensor, value_THD: Tensor, rule: Rule) -> Tensor:
        if rule.dropout:
            raise ValueError("FlexAttention has no dropout: set the model's attention dropout to 0")
        output_1HTD, aux = _flex(query_THD.device.type)(
            *(x.transpose(0, 1)[None] for x in (query_THD, key_THD, value_THD)),
            score_mod=_capped(rule.softcap) if rule.softcap is not None else None,
            block_mask=self._mask(rule.window),
            scale=rule.scale,
            enable_gqa=query_THD.shape[1] != key_THD.shape[1],
            return_aux=flex.AuxRequest(lse=True),
        )
        if rule.sinks_H is not None:  # a sink takes its share of the softmax and gives nothing
            kept_1HT = torch.sigmoid(aux.lse - rule.sinks_H.float()[:, None])
            output_1HTD = output_1HTD * kept_1HT[..., None].to(output_1HTD.dtype)
        return output_1HTD[0].transpose(0, 1)

    def visible(self, q: Tensor, k: Tensor, window: int | None) -> Tensor:
        """Whether the token at stream index `q` sees the one at `k`: its own sequence, or its shared prompt."""
        own = self.ids_T[k] == self.ids_T[q]
        shared = (self.ids_T[k] == self.parents_T[q]) & (self.positions_T[k] < self.prefix_T[q])
        back = self.positions_T[q] - self.positions_T[k]
        return (own | shared) & (back >= 0) & (back < (len(self.ids_T) if window is None else window))

    def _mask(self, window: int | None) -> flex.BlockMask:
        if window not in self.masks:  # once per pack and window, not once per layer
            length, device = len(self.ids_T), self.ids_T.device
            self.masks[window] = flex.create_block_mask(
                lambda b, h, q, k: self.visible(q, k, window), None, None, length, length, device=device
            )
        return self.masks[window]


@lru_cache
def _capped(softcap: float):
    return lambda score, b, h, q, k: softcap * torch.tanh(score / softcap)


@lru_cache
def _flex(device_type: str):
    """Compiled once for all lengths: a static shape would compile anew for every pack."""
    return torch.compile(flex.flex_attention, dynamic=True) if device_type == "cuda" else flex.flex_attention


BACKENDS = {"sdpa": Sdpa, "varlen": Varlen, "flex": Flex}


def choose(attention: str, device: torch.device, dtype: torch.dtype, reshaped: bool) -> str:
    """The backend's name: as asked for, or what suits device, precision and a model that reshapes its scores."""
    if attention not in CHOICES:
        raise ValueError(f"attention={attention} is unknown; choose one of {', '.join(CHOICES)}")
    if attention != "auto":
        return attention
    if device.type != "cuda" or dtype == torch.float32:
        return "sdpa"
    return "flex" if reshaped else "varlen"


def reshapes_scores(model: PreTrainedModel) -> bool:
    """Whether a layer caps its scores or adds sinks to them, which FlashAttention cannot."""
    return _is_capped(model) or any(name.endswith("sinks") for name, _ in model.named_parameters())


def _is_capped(model: PreTrainedModel) -> bool:
    return getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None


def share_prompts(model: PreTrainedModel) -> None:
    """Route every layer's attention here. Raises ValueError, with the model's name, where that is impossible."""
    if model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise ValueError(refusal(model, "its attention cannot be replaced"))


def refusal(model: PreTrainedModel, reason: str) -> str:
    """The sentence for a model that cannot share prompts: its name, why, and what to do."""
    return (
        f"{type(model).__name__} cannot share prompts: {reason}. "
        "Choose attention=plain, which runs one sequence at a time with the model's own attention"
    )


@contextmanager
def own_attention(model: PreTrainedModel):
    """Within it the model attends by itself, as for generation; afterwards as before.

    Its own choice, but for soft caps, which transformers' `sdpa` left out in earlier releases.
    """
    before = model.config._attn_implementation
    own = "eager" if _is_capped(model) else model.get_correct_attn_implementation(None)
    model.set_attn_implementation(own)
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


def attend(
    module,
    query_1HTD: Tensor,
    key_1HTD: Tensor,
    value_1HTD: Tensor,
    attention_mask: None,
    *,
    packed: Sdpa | Varlen | Flex | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_unused,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer; the names are its own."""
    if packed is None:
        raise ValueError(
            f"{type(module).__name__} was run without a pack: score with a Scorer, and generate within own_attention; "
            "if this is a Scorer, the model does not hand its arguments on, and needs attention=plain"
        )
    rule = Rule(scaling, sliding_window, softcap, s_aux, dropout)
    query_THD, key_THD, value_THD = (x[0].transpose(0, 1) for x in (query_1HTD, key_1HTD, value_1HTD))
    return packed(query_THD, key_THD, value_THD, rule)[None], None


def _no_mask(**_arguments) -> None:
    """Packs know what each token sees; the models' own masks would be [tokens, tokens]."""


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _no_mask)
