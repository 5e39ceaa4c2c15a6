"""Attention on a GPU: one kernel call for all sequences of a stream.

Shapes: T tokens of the stream, S sequences, K tokens of all sequences, H query heads (keys and values may have
fewer), D head dimension.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention import varlen

from sdpo.errors import UserError
from sdpo.model.attention.sdpa import Rule
from sdpo.model.packing import Pack

# Bytes of shared memory of a thread block: an A100 has 166,912 and an H100 232,448; A10, L4 and RTX 3090 to 5090 have
# 101,376, in which Triton's usual tiles have no room if the head of a token has more than 256 bytes.
MUCH_SHARED_MEMORY, BYTES_OF_HEAD = 160_000, 256
SMALL_TILES = {f"bwd_BLOCK_{side}": 32 for side in ("M1", "N1", "M2", "N2")}  # of 16 bits; in fp32 they are small


class Varlen:
    """CUDA, 16 bits: one FlashAttention call in which a rejected response also attends to its prompt's keys.

    A sequence may have fewer queries than keys. FlashAttention (from 2.1 on) then aligns the causal mask at the bottom
    right: the last query is at the last key.
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
            raise UserError("varlen attention has no soft cap, sinks or dropout: choose launch.attention=sdpa")
        window = -1 if rule.window is None else rule.window - 1
        options: dict[str, Any] = {"enable_gqa": query_THD.shape[1] != key_THD.shape[1], "num_splits": 1}
        output_THD = varlen.varlen_attn(
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
        assert isinstance(output_THD, Tensor)  # a tuple only if auxiliary outputs are asked for
        return output_THD


@lru_cache
def _varlen_parameters() -> frozenset[str]:
    """The parameters of this PyTorch's varlen_attn; newer releases have more."""
    return frozenset(inspect.signature(varlen.varlen_attn).parameters)


class Flex:
    """CUDA: FlexAttention over the stream itself, without gathering keys; supports soft caps and sinks.

    On a CPU it has no backward pass. What a mask or a soft cap reads is a tensor: a number would be a symbol of the
    graph that is compiled for all lengths, which the kernels cannot read.
    """

    def __init__(self, pack: Pack):
        own_S, lengths_S = torch.tensor(pack.own_S), torch.tensor(pack.lengths_S)
        prefix_S, ids_S = lengths_S - own_S, torch.arange(len(own_S))
        per_token = (ids_S, ids_S - (prefix_S > 0).int(), prefix_S)
        self.ids_T, self.parents_T, self.prefix_T = (
            x.repeat_interleave(own_S).to(pack.tokens_T.device) for x in per_token
        )
        self.positions_T = pack.positions_T
        self.masks: dict[int | None, flex.BlockMask] = {}  # by window

    def __call__(self, query_THD: Tensor, key_THD: Tensor, value_THD: Tensor, rule: Rule) -> Tensor:
        if rule.dropout:
            raise UserError("FlexAttention has no dropout: set the model's attention dropout to 0")
        device = query_THD.device
        output_1HTD, aux = _flex(device.type)(
            *(x.transpose(0, 1)[None] for x in (query_THD, key_THD, value_THD)),
            score_mod=_capped(rule.softcap, device) if rule.softcap is not None else None,
            block_mask=self._mask(rule.window),
            scale=rule.scale,
            enable_gqa=query_THD.shape[1] != key_THD.shape[1],
            kernel_options=kernel_options(query_THD),
            return_aux=flex.AuxRequest(lse=True),
        )
        if rule.sinks_H is not None:  # a sink takes a share of the softmax and adds no value
            kept_1HT = torch.sigmoid(aux.lse - rule.sinks_H.float()[:, None])
            output_1HTD = output_1HTD * kept_1HT[..., None].to(output_1HTD.dtype)
        return output_1HTD[0].transpose(0, 1)

    def visible(self, q: Tensor, k: Tensor, window: Tensor) -> Tensor:
        """Whether the token at stream index `q` sees the one at `k`, in its own sequence or in its shared prompt.

        The block mask asks for all pairs of tokens at once, so nothing but booleans may depend on both `q` and `k`.
        """
        own = self.ids_T[k] == self.ids_T[q]
        shared = (self.ids_T[k] == self.parents_T[q]) & (self.positions_T[k] < self.prefix_T[q])
        is_near = (self.positions_T[k] <= self.positions_T[q]) & (self.positions_T[k] > self.positions_T[q] - window)
        return (own | shared) & is_near

    def _mask(self, window: int | None) -> flex.BlockMask:
        if window not in self.masks:  # built once per pack and window, not once per layer
            length, device = len(self.ids_T), self.ids_T.device
            widest = torch.tensor(length if window is None else window, device=device)
            self.masks[window] = flex.create_block_mask(
                lambda b, h, q, k: self.visible(q, k, widest), None, None, length, length, device=device
            )
        return self.masks[window]


def kernel_options(query_THD: Tensor) -> dict[str, Any] | None:
    """How Triton builds the kernels for heads like these: with one stage and small tiles where others have no room."""
    if not query_THD.is_cuda:
        return None
    # Not the kernel for decoding, which `AUTO` takes for short streams: PyTorch 2.11 cannot build it there.
    options: dict[str, Any] = {"BACKEND": "TRITON"}
    properties = torch.cuda.get_device_properties(query_THD.device)
    room = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # which the stubs do not list
    if room >= MUCH_SHARED_MEMORY or query_THD.shape[-1] * query_THD.element_size() <= BYTES_OF_HEAD:
        return options
    return options | {"num_stages": 1} | ({} if query_THD.dtype == torch.float32 else SMALL_TILES)


@lru_cache
def _capped(softcap: float, device: torch.device) -> Callable:
    most = torch.tensor(softcap, device=device)
    return lambda score, b, h, q, k: most * torch.tanh(score / most)


@lru_cache
def _flex(device_type: str) -> Callable:
    """FlexAttention, on a GPU compiled once for all lengths; with static shapes it would be compiled for every pack."""
    if device_type != "cuda":
        return flex.flex_attention
    return torch.compile(flex.flex_attention, dynamic=True)
