"""Fields of the configuration that allow some values only, and what the user is told of a wrong key or value."""

from dataclasses import MISSING as NO_DEFAULT
from dataclasses import field, fields, is_dataclass
from math import inf
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from sdpo.errors import UserError

OF_TRL = {  # TRL's name of a setting -> ours
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "warmup_ratio": "optim.warmup",
    "num_train_epochs": "optim.epochs",
    "max_grad_norm": "optim.clip",
    "per_device_train_batch_size": "optim.pairs_per_update",
    "gradient_accumulation_steps": "optim.pairs_per_update",
    "gradient_checkpointing": "launch.recompute_activations",
    "max_length": "data.max_tokens",
    "truncation_mode": "data.on_long",
    "loss_type": "loss",
    "ref_model": "reference",
    "report_to": "record",
}


def one_of(*choices: Any, default: Any = NO_DEFAULT) -> Any:
    """A field that takes one of `choices`; its default is `default`, else the first of them."""
    return field(default=choices[0] if default is NO_DEFAULT else default, metadata={"choices": choices})


def at_least(low: float, default: float | None, high: float = inf) -> Any:
    """A field that holds a number from `low` to `high`, both included, or None if its type allows it."""
    return field(default=default, metadata={"low": low, "high": high})


def share(default: float) -> Any:
    """A field that holds a number from 0 to 1."""
    return at_least(0, default, 1)


def check(node: Any, prefix: str = "") -> None:
    """Raise UserError for the first value that its field's metadata does not allow; `prefix` stands before its key."""
    for f in fields(node):
        value, key = getattr(node, f.name), prefix + f.name
        if "choices" in f.metadata and value not in f.metadata["choices"]:
            choices = ", ".join("null" if c is None else str(c) for c in f.metadata["choices"])
            raise UserError(f"{key} is {value!r}; it can be {choices}")
        if "low" in f.metadata and value is not None and not f.metadata["low"] <= value <= f.metadata["high"]:
            raise UserError(f"{key} is {value}; it must be {_range(f.metadata['low'], f.metadata['high'])}")
        inner = value if isinstance(value, dict) else {None: value}
        for name, child in inner.items():
            if is_dataclass(child):
                check(child, f"{key}." if name is None else f"{key}.{name}.")


def _range(low: float, high: float) -> str:
    return f"at least {low}" if high == inf else f"from {low} to {high}"


def sentence(error: OmegaConfBaseException, root: str = "the configuration") -> str:
    """Return one line for the user: the wrong key, and the keys that exist; `root` is the name of the top level."""
    if isinstance(error, AttributeError | KeyError) and error.parent_node is not None:
        parent = error.parent_node._get_full_key(None) or root
        similar = _inner_keys(error.parent_node, error.full_key) if parent == root else []
        keys = ", ".join(error.parent_node) or "none"
        exists = f"did you mean {' or '.join(similar)}?" if similar else f"{parent} has {keys}"
        name = str(error.full_key).rpartition(".")[2]
        if ours := OF_TRL.get(name):
            exists = f"TRL's {name} is {ours} here (docs/trl.md lists all of TRL's settings)"
        return f"unknown key {error.full_key}; {exists}"
    if "is not a ListConfig" in str(error):
        return f"{error.full_key} is a list; write '{error.full_key}=[...]'"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value"
    return ": ".join(filter(None, [error.full_key, str(error).splitlines()[0]]))


def _inner_keys(node: DictConfig, name: str | None) -> list[str]:
    """The keys called `name` one level below `node`, with the level's name before them."""
    given = cast(dict[str, Any], OmegaConf.to_container(node, resolve=False))
    return [f"{group}.{name}" for group, inner in given.items() if isinstance(inner, dict) and name in inner]
