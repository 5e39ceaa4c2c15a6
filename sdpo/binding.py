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

from sdpo.config import Settings
from sdpo.errors import UserError
from sdpo.fields import sentence


def bind(module: ModuleType, settings: Settings) -> partial[Any]:
    """Return the function of `module` that settings["name"] names, with its keyword-only arguments filled in.

    A function that reads `parts` gets what other functions of `module` return, which its setting `of` names. Raises
    UserError for an unknown name or key, a value of the wrong type, and a missing value.
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
    return _of_parts(module, function, **keywords) if "parts" in inputs_of(function) else partial(function, **keywords)


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


def _of_parts(module: ModuleType, function: Callable, of: list[Settings]) -> partial[Any]:
    """A function of what other functions return: it reads what any of these reads, and hands it to them.

    Each item of `of` has the settings of one of them, and its `weight`.
    """
    parts, complete = [], []
    for settings in of:
        given = dict(settings)
        weight = given.pop("weight", None)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise UserError(f"{module.__name__}.{function.__name__}: {settings} has no number as its weight")
        parts.append(bind(module, given))
        complete.append({"name": given["name"], "weight": float(weight), **parts[-1].keywords})
    if not parts:
        raise UserError(f"{module.__name__}.{function.__name__}: of is empty; name what it is made of")
    inputs = list(dict.fromkeys(name for part in parts for name in inputs_of(part)))

    def whole(*data: Any, of: list[Settings]) -> Any:
        by_name = dict(zip(inputs, data, strict=True))
        return function([part(*(by_name[name] for name in inputs_of(part))) for part in parts], of=of)

    signature = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in inputs]
    signature.append(inspect.Parameter("of", inspect.Parameter.KEYWORD_ONLY))
    whole.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    return partial(whole, of=complete)


@cache
def _keywords(function: Callable) -> DictConfig:
    """The keyword-only parameters of a function as a typed node; all callers share it, and merging copies it."""
    wanted = [
        (p.name, p.annotation, field(default=MISSING if p.default is p.empty else p.default))
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    ]
    return OmegaConf.structured(make_dataclass(function.__name__, wanted))
