"""Launch settings that change how a step is computed: other attention and compiled graphs give the same losses."""

import pytest
from conftest import read_lines


def losses(folder):
    return [entry["loss"] for entry in read_lines(folder, "train")]


def test_plain_attention_gives_the_same_losses_and_is_a_step_of_its_own(run, tmp_path):
    shared, plain = run("split=by_source"), run("split=by_source", "launch.attention=plain", name="plain")
    assert losses(plain) == pytest.approx(losses(shared), rel=1e-5)
    assert len(list((tmp_path / "store" / "step").iterdir())) == 6


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["launch.recompute_activations=true"], ["tune=lora"]])
@pytest.mark.filterwarnings("ignore:::torch")  # the compiler's own warnings
def test_compiled_graphs_give_the_same_losses(run, more):
    eager, compiled = (
        run("split=by_source", *more),
        run("split=by_source", *more, "launch.compile=true", name="compiled"),
    )
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-5)
