"""What a step trains: all weights, or low-rank adapters and some whole modules beside frozen weights.

A variant checks its settings and returns the adapter, or None if all weights are trained. This file does not import
torch.
"""

from importlib.util import find_spec
from typing import NamedTuple

from sdpo.errors import UserError


class Adapter(NamedTuple):
    """A low-rank adapter: a layer uses W + alpha / rank * B @ A instead of its weight W; B is 0 at a step's start.

    The modules in `modules_to_save` (peft's name) are trained whole.
    """

    rank: int
    alpha: float
    dropout: float
    targets: list[str]
    modules_to_save: list[str]
    between: str
    quantize: str


def full() -> None:
    """Train all weights."""


def lora(
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: list[str],
    modules_to_save: list[str],
    between: str,
    quantize: str,
) -> Adapter:
    """LoRA, Hu et al. 2106.09685; with `quantize`, QLoRA, Dettmers et al. 2305.14314.

    `between` two steps, `merge` adds the adapter to the weights, and `stack` freezes it and trains the next one beside
    it. Raises UserError for a value outside its range, and for 4 bits without `stack` or without bitsandbytes.
    """
    if rank < 1:
        raise UserError(f"tune.rank must be at least 1, not {rank}")
    if alpha <= 0:
        raise UserError(f"tune.alpha must be above 0, not {alpha}")
    if not 0 <= dropout < 1:
        raise UserError(f"tune.dropout must be at least 0 and below 1, not {dropout}")
    if not targets:
        raise UserError("tune.targets is empty: give names of linear layers, or all-linear")
    if between not in ("merge", "stack"):
        raise UserError(f"tune.between is {between!r}; it can be merge, stack")
    if quantize not in ("none", "4bit"):
        raise UserError(f"tune.quantize is {quantize!r}; it can be none, 4bit")
    if quantize == "4bit" and between != "stack":
        raise UserError("tune.quantize=4bit needs tune.between=stack: rounding after a merge would erase the adapter")
    if quantize == "4bit" and find_spec("bitsandbytes") is None:
        raise UserError("tune.quantize=4bit needs bitsandbytes: pip install bitsandbytes, or tune.quantize=none")
    return Adapter(rank, alpha, dropout, targets, modules_to_save, between, quantize)
