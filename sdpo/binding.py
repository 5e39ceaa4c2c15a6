"""Bind a choice of the configuration to its function.

A module of variants, such as `sdpo.variants.loss`, defines one public function per option of its axis. The positional
parameters of a function name the data that it reads; its keyword-only parameters are its settings.
"""

import inspect
from collections.abc import Callable
from dataclasses import field, make_dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any, cast

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdpo.config import Settings, sentence
from sdpo.errors import UserError


def bind(module: ModuleType, settings: Settings) -> partial[Any]:
    """Return the function of `module` that settings["name"] names, with its keyword-only arguments filled in.

    Raises UserError for an unknown name or key, a value of the wrong type, and a missing value.
    """
    given = dict(settings)
    name = given.pop("name", None)
    if name not in variants(module):
        raise UserError(f"{module.__name__} has no {name!r}; it has {', '.join(variants(module))}")
    function = variants(module)[name]
    try:
        filled = OmegaConf.merge(_keywords(function), given)
        keywords = cast(Settings, OmegaConf.to_container(filled, throw_on_missing=True))
    except OmegaConfBaseException as error:
        raise UserError(f"{module.__name__}.{name}: {sentence(error, name)}") from error
    return partial(function, **keywords)


def variants(module: ModuleType) -> dict[str, Callable]:
    """Return the public functions that `module` itself defines, by name: the options of its axis."""
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }


def inputs_of(function: Callable) -> list[str]:
    """Return the names of the data that a variant reads: its positional parameters."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]


@cache
def _keywords(function: Callable) -> DictConfig:
    """The keyword-only parameters of a function as a typed node; all callers share it, and merging copies it."""
    wanted = [
        (p.name, p.annotation, field(default=MISSING if p.default is p.empty else p.default))
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    ]
    return OmegaConf.structured(make_dataclass(function.__name__, wanted))
