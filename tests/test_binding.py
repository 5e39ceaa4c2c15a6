"""From a name and settings to a function: what is bound, and what is refused in which words."""

import sys
from functools import partial
from types import ModuleType

import pytest

from sdpo import binding
from sdpo.errors import UserError


@pytest.fixture
def room(monkeypatch):
    """A room with one variant, one helper, and one function that only passed through."""

    def scaled(values, offset, *, factor: float, times: int | None = None, names: list[str] = ()):
        return values, offset, factor, times, names

    module = ModuleType("room")
    scaled.__module__ = "room"
    helper = type(scaled)(scaled.__code__, {}, "_helper")
    helper.__module__ = "room"
    module.scaled, module._helper, module.visitor = scaled, helper, binding.bind
    monkeypatch.setitem(sys.modules, "room", module)  # where dataclasses look annotations up
    return module


def test_choose_fills_in_the_keywords(room):
    chosen = binding.bind(room, {"name": "scaled", "factor": 2})
    assert isinstance(chosen, partial) and chosen(1, 3) == (1, 3, 2.0, None, [])
    assert list(binding.variants(room)) == ["scaled"]
    assert binding.inputs_of(chosen) == binding.inputs_of(room.scaled) == ["values", "offset"]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"name": "_helper"}, "room has no '_helper'; it has scaled"),
        ({"factor": 1}, "room has no None; it has scaled"),
        (
            {"name": "scaled", "factor": 1, "offset": 2},
            "room.scaled: unknown key offset; scaled has factor, times, names",
        ),
        ({"name": "scaled", "factor": "two"}, "room.scaled: factor: Value 'two'"),
        ({"name": "scaled", "factor": 1, "times": 1.5}, "room.scaled: times: Value '1.5'"),
        ({"name": "scaled"}, "room.scaled: factor has no value"),
    ],
)
def test_choose_names_the_key_that_is_wrong(room, given, sentence):
    with pytest.raises(UserError, match="^[^\n]*$") as error:
        binding.bind(room, given)
    assert sentence in str(error.value)
