"""Rotary frequencies that depend on the length of the sequence: dynamic NTK and LongRoPE (Ding et al. 2402.13753).

transformers reads the length off the largest position of a forward pass, so that a pack would give every sequence the
frequencies of its longest one; and dynamic NTK keeps the frequencies of the longest sequence that it ever saw.
"""

import math

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

ORIGINAL = "original_inv_freq"  # the end of the name of the frequencies of short sequences in a rotary module


def settings(config: PretrainedConfig) -> list[dict]:
    """The rotary settings of a model: one dictionary, or one per type of layers, or none."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]


def longest_with_fixed_frequencies(config: PretrainedConfig) -> float:
    """The length up to which all sequences have the same frequencies; infinite if all lengths do."""
    limits = [math.inf]
    for rope in settings(config):
        if rope.get("rope_type") == "longrope":
            limits.append(rope["original_max_position_embeddings"])
        elif "dynamic" in rope.get("rope_type", ""):
            limits.append(config.max_position_embeddings)
    return min(limits)


def longest_readable(config: PretrainedConfig) -> float:
    """The number of positions that a model has; infinite if its configuration names none.

    Scaling of rotary frequencies extends the length of pre-training, which some configurations name and some already
    name extended: the larger number counts.
    """
    named = getattr(config, "max_position_embeddings", None) or math.inf
    extended = [
        rope["factor"] * (rope.get("original_max_position_embeddings") or named)
        for rope in settings(config)
        if rope.get("factor")
    ]
    return max(named, *extended) if extended else named


def forget_lengths(model: PreTrainedModel) -> None:
    """Make the frequencies of dynamic NTK depend on the sequence of a forward pass alone, not on earlier passes."""
    for module in model.modules():
        if hasattr(module, "max_seq_len_cached") and hasattr(module, "original_max_seq_len"):
            module.register_forward_pre_hook(_forget)


def _forget(module: nn.Module, _arguments: tuple) -> None:
    for name in [name for name in (*module._buffers, *vars(module)) if name.endswith(ORIGINAL)]:
        prefix = name.removesuffix(ORIGINAL)
        setattr(module, f"{prefix}inv_freq", getattr(module, name).clone())
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
