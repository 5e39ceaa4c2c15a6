"""An external reference reads the same texts as the policy, untruncated and in its own tokens."""

import pytest
import toys
from conftest import byte_tokenizer, random_model, read_lines

from sdpo import validate
from sdpo.errors import UserError


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model other than S."""
    folder = tmp_path_factory.mktemp("other")
    random_model(seed=3).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def external(folder, template="alpaca"):
    return f"{{name: external, path: {folder}, template: {template}}}"


def test_the_reference_of_a_single_step_reads_its_own_tokens(toy, tmp_path, other):
    settings, inputs = toys.prepare(toy, tmp_path, f"steps.2.reference={external(other)}")
    validate.check(settings)
    (foreign,) = inputs.runner.foreign.values()
    assert foreign.keys() == {*inputs.train.ids, *inputs.held_out.ids}
    ours = inputs.train.rows[0]
    assert len(foreign[ours.id].prompt) > len(ours.prompt)  # the alpaca template adds text


def test_dropped_pairs_are_not_read(toy, tmp_path, other):
    dropped = ("data.max_tokens=40", "data.on_long=drop")
    _, inputs = toys.prepare(toy, tmp_path, f"steps.1.reference={external(other, 'plain')}", *dropped)
    (foreign,) = inputs.runner.foreign.values()
    assert foreign.keys() == {*inputs.train.ids, *inputs.held_out.ids}
    assert sum(source["dropped_long"] for source in inputs.report["tokens"]["train"]["sources"].values())


@pytest.mark.parametrize(
    "given, sentence",
    [
        (
            ["steps.2.reference={other}", "data.max_tokens=40", "data.on_long=truncate_response"],
            r"pairs are truncated by data.on_long=truncate_r\S+, but .* set data.on_long=",
        ),
        (["steps.2.reference={other}", "steps.1.reference={plain}"], "is read with two templates; give it the same"),
        (["steps.2.reference={itself}"], "is S itself: use reference=initial"),
    ],
)
def test_what_cannot_be_compared_is_refused(toy, tmp_path, other, given, sentence):
    named = {"other": external(other), "plain": external(other, "plain"), "itself": external(toy / "model")}
    with pytest.raises(UserError, match=sentence):
        toys.prepare(toy, tmp_path, *(override.format_map(named) for override in given))


def test_another_template_of_the_reference_is_another_step(run, other):
    at_once = ("split=all_at_once", "reference=external", f"reference.path={other}")
    folders = [run(*at_once, f"reference.template={template}", name=template) for template in ("alpaca", "plain")]
    gammas = [read_lines(folder, "step")[0]["gamma_ref_mean"] for folder in folders]
    assert gammas[0] != gammas[1] and not read_lines(folders[1], "step")[0]["reused"]
