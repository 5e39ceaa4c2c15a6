"""The attention that a shared prompt needs, behind transformers' attention interface; one class per backend.

Model code stays untouched: the pack's backend travels through the forward pass as the keyword argument `packed`
and arrives here with each layer's query, key and value. Every backend sees the same sequences; they differ in how.

Shapes: T tokens of the stream, H query heads (keys and values may have fewer), D head dimension.
"""

from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from sdpo.errors import UserError
from sdpo.model.attention.cuda import Flex, Varlen
from sdpo.model.attention.sdpa import Rule, Sdpa

NAME = "sdpo"
CHOICES = ("auto", "sdpa", "varlen", "flex", "plain")
BACKENDS = {"sdpa": Sdpa, "varlen": Varlen, "flex": Flex}


def choose(attention: str, device: torch.device, dtype: torch.dtype, reshaped: bool) -> str:
    """The backend's name: as asked for, or what suits device, precision and a model that reshapes its scores."""
    if attention not in CHOICES:
        raise UserError(f"attention={attention} is unknown; choose one of {', '.join(CHOICES)}")
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
    """Route every layer's attention here. Raises UserError, with the model's name, where that is impossible."""
    if model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise UserError(refusal(model, "its attention cannot be replaced"))


def refusal(model: PreTrainedModel, reason: str) -> str:
    """The sentence for a model that cannot share prompts: its name, why, and what to do."""
    return (
        f"{type(model).__name__} cannot share prompts: {reason}. "
        "Choose launch.attention=plain, which runs one sequence at a time with the model's own attention"
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
        raise UserError(
            f"{type(module).__name__} was run without a pack: score with a Scorer, and generate within own_attention; "
            "if this is a Scorer, the model does not hand its arguments on, and needs launch.attention=plain"
        )
    rule = Rule(scaling, sliding_window, softcap, s_aux, dropout)
    query_THD, key_THD, value_THD = (x[0].transpose(0, 1) for x in (query_1HTD, key_1HTD, value_1HTD))
    return packed(query_THD, key_THD, value_THD, rule)[None], None


def leave_out_of_graphs() -> None:
    """Keep attention eager where the rest is compiled: its work depends on the pack, and would be compiled for each."""
    AttentionInterface.register(NAME, torch.compiler.disable(attend))


def _no_mask(**_arguments) -> None:
    """Packs know what each token sees; the models' own masks would be [tokens, tokens]."""


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _no_mask)
