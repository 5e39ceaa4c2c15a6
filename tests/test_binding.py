"""Binding a name and settings to a function: what is filled in, and which error names which key."""

import sys
from functools import partial
from types import ModuleType

import pytest

from sdpo import binding
from sdpo.errors import UserError


@pytest.fixture
def variants(monkeypatch):
    """A module with one variant, one private helper, and one function that it imported."""

    def scaled(values, offset, *, factor: float, times: int | None = None, names: list[str] = ()):
        return values, offset, factor, times, names

    module = ModuleType("variants")
    scaled.__module__ = "variants"
    helper = type(scaled)(scaled.__code__, {}, "_helper")
    helper.__module__ = "variants"
    module.scaled, module._helper, module.imported = scaled, helper, binding.bind
    monkeypatch.setitem(sys.modules, "variants", module)  # where dataclasses look up annotations
    return module


def test_bind_fills_in_the_keywords(variants):
    bound = binding.bind(variants, {"name": "scaled", "factor": 2})
    assert isinstance(bound, partial) and bound(1, 3) == (1, 3, 2.0, None, [])
    assert list(binding.variants(variants)) == ["scaled"]
    assert binding.inputs_of(bound) == binding.inputs_of(variants.scaled) == ["values", "offset"]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"name": "_helper"}, "variants has no '_helper'; it has scaled"),
        ({"factor": 1}, "variants has no None; it has scaled"),
        (
            {"name": "scaled", "factor": 1, "offset": 2},
            "variants.scaled: unknown key offset; scaled has factor, times, names",
        ),
        ({"name": "scaled", "factor": "two"}, "variants.scaled: factor: Value 'two'"),
        ({"name": "scaled", "factor": 1, "times": 1.5}, "variants.scaled: times: Value '1.5'"),
        ({"name": "scaled"}, "variants.scaled: factor has no value"),
    ],
)
def test_an_error_names_the_wrong_key(variants, given, sentence):
    with pytest.raises(UserError, match="^[^\n]*$") as error:
        binding.bind(variants, given)
    assert sentence in str(error.value)
