"""Adapters on mixtures of experts, whose weights transformers stacks in 3-D parameters that are no linear layers."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import toys
from conftest import random_model
from test_adapters import ALPHA, LORA, RANK, Chain, as_peft_reads_it, check_adapters, check_two_ranks

from sdpo.errors import UserError
from sdpo.model import hub
from sdpo.model.logprobs import naive_logprobs
from sdpo.train import throughput

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
MODELS = {"mixtral": {}, "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}}


def model_path(toy, folder, architecture="mixtral", **sizes):
    """The setting of a model with four experts per layer; gpt_oss stores them transposed."""
    shutil.copytree(toy / "model", folder)
    model = random_model(architecture, num_local_experts=4, num_experts_per_tok=2, **MODELS[architecture], **sizes)
    model.save_pretrained(folder)
    return f"model.path={folder}"


@pytest.fixture(scope="module")
def chains(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    path = model_path(toy, folder / "model")
    return {name: Chain(toy, folder / "store", path, f"tune.between={name}") for name in ("merge", "stack")}


def experts(model):
    """The stacked weights of a step's model, by name."""
    state = hub.load(model.folder).state_dict()
    return {name: tensor for name, tensor in state.items() if name.endswith(EXPERTS)}


def test_a_token_is_multiplied_with_two_of_four_experts(toy, tmp_path):
    model_path(toy, tmp_path / "model")
    model = hub.load(tmp_path / "model")
    of_experts = sum(param.numel() for name, param in model.named_parameters() if name.endswith(EXPERTS))
    counted = hub.count_weights(tmp_path / "model") - of_experts // 2
    assert hub.count_weights(tmp_path / "model", per_token=True) == counted
    assert throughput.multiplied(model) == counted - model.get_input_embeddings().weight.numel()


@pytest.mark.parametrize("name", ["merge", "stack"])
def test_every_step_trains_every_expert_by_a_matrix_of_the_adapters_rank(chains, name):
    initial, *later = map(experts, chains[name].models)
    assert len(initial) == 4
    for before, after in zip([initial, *later], later, strict=False):
        for parameter in initial:
            change = (after[parameter] - before[parameter]).double()
            assert torch.linalg.matrix_rank(change, rtol=1e-3).tolist() == 4 * [RANK]


def test_margins_are_zero_at_every_start_and_merging_is_stacking(chains):
    for name, tolerance in (("merge", 0.0), ("stack", 1e-5)):
        assert max(abs(step.entries[0]["margin"]) for step in chains[name].steps) <= tolerance
    for ours, theirs in zip(chains["merge"].logps_N2, chains["stack"].logps_N2, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


@as_peft_reads_it
@pytest.mark.parametrize("name", ["merge", "stack"])
def test_peft_gets_the_step_s_model_from_its_adapter_and_base(chains, name):
    check_adapters(chains[name], stacked=name == "stack")


def test_the_merged_experts_by_hand(chains):
    chain = chains["stack"]
    name = "model.layers.1.mlp.experts.down_proj"
    settings, weights = chain.adapter(2)
    assert name in settings.target_parameters
    before, after = (experts(chain.models[t])[name] for t in (0, 2))
    prefix = f"base_model.model.{name.rpartition('.')[0]}"
    found = [weights[f"{prefix}{inner}.lora_{factor}.weight"] for inner in ("", ".base_layer") for factor in "AB"]
    a, b = next((a, b) for a, b in zip(found[::2], found[1::2], strict=True) if len(b) == after.shape[1])
    for expert in range(4):
        rows = a[2 * RANK * expert : 2 * RANK * (expert + 1)]
        product = sum(torch.outer(b[:, 4 * r + expert], rows[r]) for r in range(2 * RANK))
        torch.testing.assert_close(after[expert] - before[expert], ALPHA / RANK * product, atol=1e-6, rtol=0)


@pytest.mark.parametrize("architecture", MODELS)
def test_a_mixed_reference_is_the_mean_of_merged_experts(run, toy, tmp_path, architecture):
    path = model_path(toy, tmp_path / "model", architecture)
    every = [*LORA, path, "split=all_at_once", "optim.schedule=constant", "optim.warmup=0", "optim.pairs_per_update=33"]
    every += ["reference=mixed", "reference.updates=2", "reference.alpha=0.6"]
    policy = hub.load(run(*every, "optim.epochs=1", name="one epoch") / "steps" / "1").state_dict()
    folder = run(*every, "optim.epochs=2", name="two epochs")
    mixed = hub.load(tmp_path / "model")
    mixed.load_state_dict({name: 0.4 * tensor + 0.6 * policy[name] for name, tensor in mixed.state_dict().items()})
    _, start = toys.prepare(toy, tmp_path / "store", path, "data.held_out_share=0.1")
    read = pd.read_parquet(folder / "steps" / "1" / "reference.parquet").set_index("id")
    with torch.no_grad():
        expected = [list(naive_logprobs(mixed, row)) for row in start.train.rows]
    found = read.loc[[row.id for row in start.train.rows]].to_numpy()
    np.testing.assert_allclose(found, np.array(expected), atol=2e-4, rtol=0)


def test_a_key_says_that_experts_are_adapted_and_else_nothing(run, toy, tmp_path):
    path = model_path(toy, tmp_path / "model")
    quick = ["tune=lora", path, "split=all_at_once", "optim.pairs_per_update=99"]
    for targets, said in (("all-linear", "adapted"), ("q_proj", None)):
        folder = run(*quick, f"tune.targets=[{targets}]", name=targets)
        assert json.loads((folder / "steps" / "1" / "manifest.json").read_text()).get("experts") == said


def test_experts_are_targets_by_name_and_never_with_dropout(run, toy, tmp_path, capsys):
    path = model_path(toy, tmp_path / "model")
    quick = ["tune=lora", path, "split=all_at_once", "optim.pairs_per_update=99"]
    run(*quick, "tune.targets=[q_proj,experts.down_proj]", name="one of two")
    said = capsys.readouterr().err
    assert "adapts experts.down_proj, q_proj (" in said and "leaves experts.gate_up_proj frozen (" in said
    with pytest.raises(UserError, match=r"tune.dropout=0.1 cannot be applied to experts such as model.layers.0.mlp"):
        run(*quick, "tune.dropout=0.1", name="dropout")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 1, 2, 3])
def test_two_ranks_train_the_same_experts(run, toy, tmp_path, stage):
    """The experts and their factors are so large that ZeRO-3 divides them over the ranks."""
    path = model_path(toy, tmp_path / "model", hidden_size=192, intermediate_size=192)
    overrides = [*LORA, path, "tune.rank=160", "optim.lr=1e-3", "optim.epochs=1", "tune.between=stack"]
    overrides += ["split=random", "split.num_chunks=2", "launch.device=cpu"]
    overrides += ["reference=mixed", "reference.alpha=0.6", "reference.updates=3"]
    check_two_ranks(run(*overrides), tmp_path / "two", stage)
