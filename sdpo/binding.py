"""A room is a file with one function per variant of an axis: from a name and settings to the function, bound.

A function's positional parameters are the data that it reads, by name; its keyword-only ones are its settings.
"""

import inspect
from collections.abc import Callable
from dataclasses import field, make_dataclass
from functools import cache, partial
from types import ModuleType

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdpo.config import Settings, sentence
from sdpo.errors import UserError


def bind(room: ModuleType, settings: Settings) -> Callable:
    """The function of `room` called settings["name"], with its keyword-only arguments filled in."""
    given = dict(settings)
    name = given.pop("name", None)
    if name not in variants(room):
        raise UserError(f"{room.__name__} has no {name!r}; it has {', '.join(variants(room))}")
    function = variants(room)[name]
    try:
        filled = OmegaConf.merge(_keywords(function), given)
        return partial(function, **OmegaConf.to_container(filled, throw_on_missing=True))
    except OmegaConfBaseException as error:
        raise UserError(f"{room.__name__}.{name}: {sentence(error, name)}") from error


def variants(room: ModuleType) -> dict[str, Callable]:
    """The public functions that `room` itself defines: the options of its axis."""
    return {
        name: value
        for name, value in vars(room).items()
        if inspect.isfunction(value) and value.__module__ == room.__name__ and not name.startswith("_")
    }


def inputs_of(function: Callable) -> list[str]:
    """The names of the data that a room's function reads: its positional parameters."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]


@cache
def _keywords(function: Callable) -> DictConfig:
    """The typed settings that a function takes: its keyword-only arguments. Merging copies it."""
    wanted = [
        (p.name, p.annotation, field(default=MISSING if p.default is p.empty else p.default))
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    ]
    return OmegaConf.structured(make_dataclass(function.__name__, wanted))
