"""The windows of every reference rule, by hand."""

import json

import pytest

from sdpo.errors import UserError
from sdpo.types import Window
from sdpo.variants import reference as references


def test_rules_with_one_window():
    assert references.previous(3, 10) == [Window(10, {"M_2": 1.0})]
    assert references.initial(3, 10) == [Window(10, {"M_0": 1.0})]
    assert references.external(3, 10, path="there") == [Window(10, {"external": 1.0})]
    assert references.average(4, 10) == [Window(10, {"M_0": 0.25, "M_1": 0.25, "M_2": 0.25, "M_3": 0.25})]


def test_rules_that_are_equal_in_special_cases():
    assert references.previous(1, 10) == references.initial(1, 10) == references.average(1, 10)
    assert references.mixed(2, 10, alpha=1.0, updates=3) == references.periodic(2, 10, updates=3)


def test_no_reference_has_no_window():
    assert references.none(1, 10) == []


def test_periodic_cuts_the_step_into_windows():
    policy = {"policy": 1.0}
    assert references.periodic(2, 8, updates=3) == [Window(3, policy), Window(3, policy), Window(2, policy)]
    assert references.periodic(2, 6, updates=3) == [Window(3, policy), Window(3, policy)]
    assert references.periodic(2, 2, updates=512) == [Window(2, policy)]


def test_mixed_starts_from_the_policy_and_then_mixes():
    mixture = {"reference": 0.4, "policy": 0.6}
    windows = references.mixed(1, 8, alpha=0.6, updates=3)
    assert windows == [Window(3, {"policy": 1.0}), Window(3, mixture), Window(2, mixture)]


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_mixed_refuses_an_alpha_out_of_range(alpha):
    with pytest.raises(UserError, match="reference.alpha"):
        references.mixed(1, 8, alpha=alpha, updates=3)


def test_windows_without_updates_are_refused():
    with pytest.raises(UserError, match="reference.updates must be at least 1, not 0"):
        references.periodic(1, 8, updates=0)


def test_a_window_with_a_bound_spans_the_step_unless_the_bound_is_passed():
    assert references.until_kl(2, 8, bound=0.5) == [Window(8, {"policy": 1.0}, 0.5)]
    with pytest.raises(UserError, match="bound must be above 0, not 0"):
        references.until_kl(1, 8, bound=0)


def test_a_loss_that_reads_no_reference_gives_the_same_model_with_every_rule(run, capsys, tmp_path):
    keys = set()
    for rule in ("none", "initial", "previous"):
        folder = run("loss=simpo", "split=random", "split.num_chunks=2", f"reference={rule}", name=rule)
        keys.add(json.loads((folder / "manifest.json").read_text())["steps"][1]["key"])
    assert len(keys) == 1
    assert capsys.readouterr().err.count(": loss=simpo reads no reference, so reference=") == 4  # two steps, two rules
