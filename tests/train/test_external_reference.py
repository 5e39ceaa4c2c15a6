"""An external reference reads the same texts as the policy, untruncated and in its own tokens."""

import pytest
import toys

from sdpo import validate
from sdpo.errors import UserError


def external(toy):
    return f"{{name: external, path: {toy / 'model'}, template: alpaca}}"


def test_the_reference_of_a_single_step_reads_its_own_tokens(toy, tmp_path):
    settings, inputs = toys.prepare(toy, tmp_path, f"steps.2.reference={external(toy)}")
    validate.check(settings)
    (foreign,) = inputs.runner.foreign.values()
    assert foreign.keys() == {*inputs.train.ids, *inputs.held_out.ids}
    ours = inputs.train.rows[0]
    assert len(foreign[ours.id].prompt) > len(ours.prompt)  # the alpaca template adds text


def test_dropped_pairs_are_not_read(toy, tmp_path):
    _, inputs = toys.prepare(
        toy, tmp_path, "reference=external", f"reference.path={toy / 'model'}", "reference.template=plain",
        "data.max_tokens=40", "data.on_long=drop",
    )  # fmt: skip
    (foreign,) = inputs.runner.foreign.values()
    assert foreign.keys() == {*inputs.train.ids, *inputs.held_out.ids}
    assert sum(source["dropped_long"] for source in inputs.report["tokens"]["train"]["sources"].values())


def test_truncated_responses_are_refused(toy, tmp_path):
    with pytest.raises(UserError, match=r"pairs are truncated by data.on_long=truncate_r\S+, but .* set data.on_long="):
        toys.prepare(
            toy, tmp_path, "reference=external", f"reference.path={toy / 'model'}", "reference.template=plain",
            "data.max_tokens=40", "data.on_long=truncate_response",
        )  # fmt: skip
