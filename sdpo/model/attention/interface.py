"""Connects the attention backends, which share a prompt between two responses, to transformers' attention interface.

Model code stays unchanged: the backend of a pack travels through the forward pass as the keyword argument `packed`,
and `attend` receives it with each layer's query, key and value. All backends compute the same attention.

Shapes: T tokens of the stream, H query heads (keys and values may have fewer), D head dimension.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from sdpo.errors import UserError
from sdpo.model.attention.cuda import Flex, Varlen
from sdpo.model.attention.sdpa import Rule, Sdpa

NAME = "sdpo"
BACKENDS = {"sdpa": Sdpa, "varlen": Varlen, "flex": Flex}
LARGEST_HEAD = 256  # of FlashAttention; Triton has no memory for larger tiles of FlexAttention
SMALLEST_HEAD = 16  # of FlexAttention
STATEFUL = {"conv", "linear_attention", "hybrid", "hybrid_sliding"}  # transformers' names of such types of layers


def choose_backend(
    attention: str, device: torch.device, dtype: torch.dtype, reshapes_scores: bool, sizes: set[tuple[int, int]]
) -> str:
    """The name of the backend: `attention` itself, or for `auto` the one that suits device, dtype and model.

    `sizes` are those of `head_sizes`. Raises UserError, which says why, if `attention` itself does not suit them.
    """
    lacks = {name: _lack(name, device, dtype, reshapes_scores, sizes) for name in ("varlen", "flex")}
    if attention == "auto":
        needs_flex = dtype != torch.float32 and (reshapes_scores or any(key != value for key, value in sizes))
        return "flex" if needs_flex and not lacks["flex"] else "sdpa" if lacks["varlen"] else "varlen"
    if lack := lacks.get(attention):
        raise UserError(f"launch.attention={attention} needs {lack}; use launch.attention=auto")
    return attention


def _lack(
    name: str, device: torch.device, dtype: torch.dtype, reshapes_scores: bool, sizes: set[tuple[int, int]]
) -> str | None:
    """What the backend `name`, varlen or flex, needs and does not have here; None if it can run."""
    every = {size for of_layer in sizes for size in of_layer}
    if device.type != "cuda":
        return "a GPU"
    least = SMALLEST_HEAD if name == "flex" else 1
    if not all(least <= size <= LARGEST_HEAD for size in every):
        return f"heads of {least} to {LARGEST_HEAD}, and this model's have {', '.join(map(str, sorted(every)))}"
    if name == "flex":
        return None
    if dtype == torch.float32:
        return "precision=bf16"
    if reshapes_scores:
        return "a model without soft caps and sinks of attention"
    if any(key != value for key, value in sizes):
        return "values that are as large as keys"
    return "heads whose size is a multiple of 8" if any(size % 8 for size in every) else None


def head_sizes(model: PreTrainedModel) -> set[tuple[int, int]]:
    """The sizes of a key and of a value of one head, in all layers that say so: DeepSeek's values are smaller."""
    layers = [vars(module) for module in model.modules() if hasattr(module, "layer_idx")]
    keys = [(layer, layer.get("qk_head_dim", layer.get("head_dim"))) for layer in layers]
    return {(key, layer.get("v_head_dim", key)) for layer, key in keys if key is not None}


def reshapes_scores(model: PreTrainedModel) -> bool:
    """Whether a layer caps its attention scores or adds sinks to them; FlashAttention supports neither."""
    return _has_softcap(model) or any(name.endswith("sinks") for name, _ in model.named_parameters())


def _has_softcap(model: PreTrainedModel) -> bool:
    return getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None


def share_prompts(model: PreTrainedModel) -> None:
    """Make every layer call `attend`.

    Raises UserError, which names the model, if its attention is fixed or some of its layers have a state.
    """
    types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if model._is_stateful or STATEFUL.intersection(types):
        raise UserError(refusal(model, "some of its layers carry a state from one response into the next"))
    if model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise UserError(refusal(model, "its attention cannot be replaced"))


def refusal(model: PreTrainedModel, reason: str) -> str:
    """The error sentence for a model that cannot share prompts: its name, the reason, and what to do."""
    return (
        f"{type(model).__name__} cannot share prompts: {reason}. "
        "Choose launch.attention=plain, which runs one sequence at a time with the model's own attention"
    )


@contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Context in which the model uses its own attention, for example to generate; undone at the end.

    This is transformers' default for the model, or `eager` for a model with soft caps, which `sdpa` ignored in earlier
    releases of transformers.
    """
    before = model.config._attn_implementation
    own = "eager" if _has_softcap(model) else model.get_correct_attn_implementation(None)
    model.set_attn_implementation(own)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attend(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1HTD: Tensor,
    value_1HTD: Tensor,
    attention_mask: int | None,
    *,
    packed: Sdpa | Varlen | Flex | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in every layer, which is why its parameters have transformers' names.

    Some models pass a layer's sliding window as `sliding_window`. Others state it in the mask alone: for them `_window`
    returns the window in place of a mask, and transformers passes it as `attention_mask`.
    Returns the output [1, T, H, D]. Raises UserError if the forward pass was given no pack.
    """
    if packed is None:
        raise UserError(
            f"{type(module).__name__} was run without a pack: score with a Scorer, and generate inside own_attention; "
            "if this is a Scorer, the model does not pass keyword arguments on to its layers: "
            "choose launch.attention=plain"
        )
    rule = Rule(scaling, attention_mask if sliding_window is None else sliding_window, softcap, s_aux, dropout)
    query_THD, key_THD, value_THD = (x[0].transpose(0, 1) for x in (query_1HTD, key_1HTD, value_1HTD))
    return packed(query_THD, key_THD, value_THD, rule)[None], None


def leave_out_of_graphs() -> None:
    """Exclude attention from torch.compile: its work depends on the pack, so it would be compiled for every pack."""
    AttentionInterface.register(NAME, torch.compiler.disable(attend))


def _window(local_size: int | None = None, **_arguments: Any) -> int | None:
    """Return the window instead of a [T, T] mask; the backends derive everything else from the pack."""
    return local_size


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _window)
