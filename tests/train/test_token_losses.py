"""Losses that read more than sums of log-probs, in whole runs: against DPO, and against values of single tokens."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import compose, read_lines
from toys import prepare
from transformers import AutoModelForCausalLM

from sdpo import export, validate
from sdpo.errors import UserError
from sdpo.train.step_key import StepSpec


def losses_of(folder):
    return [entry["loss"] for entry in read_lines(folder, "train")]


def weighted_sum(model, row, response, weights):
    tokens = torch.from_numpy(np.concatenate([row.prompt, response]).astype(np.int64))[None]
    with torch.no_grad():
        logps = model(tokens).logits[0].log_softmax(-1)
    each = [float(logps[len(row.prompt) - 1 + i, token]) for i, token in enumerate(response)]
    return sum(weight * logp for weight, logp in zip(weights, each, strict=True))


def test_ld_dpo_of_alpha_1_is_dpo(run):
    with_weights = run("loss=ld_dpo", "loss.alpha=1", name="weighted")
    assert losses_of(with_weights) == pytest.approx(losses_of(run(name="plain")), rel=1e-5)


def test_policy_and_reference_are_weighted_sums_of_the_same_tokens(run, toy, tmp_path):
    folder = run("loss=ld_dpo", "loss.alpha=0.25")
    assert [entry["loss"] for entry in read_lines(folder, "train") if entry["update"] == 1] == pytest.approx(
        [math.log(2)] * 3, abs=1e-5
    )
    with pytest.raises(UserError, match="the loss of step 2 weighs tokens; TRL's columns hold sums over all tokens"):
        export.export_pairs(folder, 2, tmp_path / "pairs.parquet")
    _, inputs = prepare(toy, tmp_path / "other")
    rows = {row.id: row for row in inputs.train.rows}
    model = AutoModelForCausalLM.from_pretrained(folder / "steps" / "1")
    stored = pd.read_parquet(folder / "steps" / "2" / "reference.parquet").iloc[:4]
    for id, chosen, rejected in stored[["id", "chosen", "rejected"]].itertuples(index=False):
        row, lengths = rows[id], (len(rows[id].chosen), len(rows[id].rejected))
        for found, response in ((chosen, row.chosen), (rejected, row.rejected)):
            weights = [1.0 if i < min(lengths) else 0.25 for i in range(len(response))]
            assert found == pytest.approx(weighted_sum(model, row, response, weights), abs=1e-3)


def test_sampo_draws_once_per_pair_step_and_seed(toy, tmp_path):
    settings, inputs = prepare(toy, tmp_path, "loss=sampo")

    def weights(seed, t=1):
        chunk = inputs.chunk(np.arange(6))
        spec = StepSpec(t, compose("loss=sampo", f"seed={seed}"), inputs.initial, [inputs.initial], chunk)
        return [np.concatenate(row.weights).tolist() for row in spec.chunk.rows], spec

    (first, spec), (again, _), (other, _), (second, _) = weights(0), weights(0), weights(1), weights(0, t=2)
    assert first == again and other != first != second
    for row in spec.chunk.rows:
        shorter = min(len(row.chosen), len(row.rejected))
        assert [part.sum() for part in row.weights] == [shorter, shorter]


@pytest.mark.parametrize("loss", ["tdpo1", "tdpo2"])
def test_tdpo_begins_every_step_without_divergence(run, loss):
    folder = run(f"loss={loss}", name=loss)
    first, second = ([one["loss"] for one in read_lines(folder, "train") if one["update"] == n] for n in (1, 2))
    assert first == pytest.approx([math.log(2)] * 3, abs=1e-5)
    assert second != pytest.approx(losses_of(run("loss=dpo", name="dpo"))[1::3], abs=1e-6)


def test_tdpo_with_a_reference_that_moves_inside_a_step(run):
    with pytest.raises(UserError, match="loss=tdpo1 reads the reference's whole .* reference=periodic moves inside"):
        run("loss=tdpo1", "reference=periodic", "reference.updates=1")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["loss=tdpo2", "deepspeed=zero3"], "loss=tdpo2 reads the whole .* beside ZeRO-3's parts"),
        (["loss=tdpo1", "reference=external", "reference.path=x"], "loss=tdpo1 reads the whole .* over other tokens"),
        (["loss=tdpo1", "reference.placebo=permute"], "loss=tdpo1 reads the whole .* a placebo does not have"),
        (["loss=mixture", "loss.of=[{name: sampo, weight: 1, beta: 0.1}]"], "loss=mixture cannot have sampo"),
        (["loss=ld_dpo", "reference=external", "reference.path=x"], "loss=ld_dpo weighs tokens, and reference=extern"),
    ],
)
def test_what_cannot_have_weights_is_refused(overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        validate.check(compose(*overrides))
