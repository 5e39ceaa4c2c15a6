"""Losses that weigh tokens, in whole runs: against DPO, and against log-probs that the test computes token by token."""

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


def test_sampo_draws_once_per_pair_and_seed(toy, tmp_path):
    settings, inputs = prepare(toy, tmp_path, "loss=sampo")

    def weights(seed):
        chunk = inputs.chunk(np.arange(6))
        spec = StepSpec(1, compose("loss=sampo", f"seed={seed}"), inputs.initial, [inputs.initial], chunk)
        return [np.concatenate(row.weights).tolist() for row in spec.chunk.rows], spec

    (first, spec), (again, _), (other, _) = weights(0), weights(0), weights(1)
    assert first == again != other
    for row in spec.chunk.rows:
        shorter = min(len(row.chosen), len(row.rejected))
        assert [part.sum() for part in row.weights] == [shorter, shorter]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["loss=mixture", "loss.of=[{name: sampo, weight: 1, beta: 0.1}]"], "loss=mixture cannot have sampo"),
        (["loss=ld_dpo", "reference=external", "reference.path=x"], "loss=ld_dpo weighs tokens, and reference=extern"),
    ],
)
def test_what_cannot_have_weights_is_refused(overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        validate.check(compose(*overrides))
