"""LoRA in chains of steps: their starts, merged weights, adapters as peft reads them, and refused settings."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import ranks
import torch
import toys
from conftest import random_model, read_lines, rounds_rows_alike
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from sdpo import config
from sdpo.binding import bind
from sdpo.model import engine, hub
from sdpo.model.logprobs import naive_logprobs
from sdpo.model.lora import adapters
from sdpo.train.step import take_step
from sdpo.train.step_key import StepSpec
from sdpo.variants import tune

RANK, ALPHA = 4, 8.0
LORA = ["tune=lora", f"tune.rank={RANK}", f"tune.alpha={ALPHA}", "optim.lr=1e-2", "optim.epochs=2"]
# peft uses a property that transformers has renamed.
as_peft_reads_it = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


class Chain:
    """Three steps on the three toy sources, and the log-probs of the held-out rows under every model."""

    def __init__(self, toy, store, *overrides):
        settings, start = toys.prepare(toy, store, *LORA, "data.held_out_share=0.1", *overrides)
        self.models, self.steps = [start.initial], []
        if settings.tune["quantize"] != "none":
            runner = start.runner
            self.models = [adapters.rounded(start.initial, runner.loading, runner.store, runner.tokenizer)]
        for t, source in enumerate("abc", start=1):
            chunk = start.chunk(np.flatnonzero(start.train.sources == source))
            spec = StepSpec(t, settings, self.models[-1], list(self.models), chunk)
            self.steps.append(take_step(spec, start.runner))
            self.models.append(self.steps[-1].model)
        self.rows = start.held_out.rows
        self.logps_N2 = [start.runner.logprobs(model, self.rows) for model in self.models]

    def adapter(self, t):
        """A step's adapter: its settings and its weights."""
        folder = self.models[t].folder / "adapter"
        return LoraConfig.from_pretrained(folder), load_file(folder / "adapter_model.safetensors")

    def weights(self, t):
        return load_file(self.models[t].folder / "model.safetensors")


WHOLE = ["embed_tokens", "lm_head"]  # modules trained whole beside the adapters
CHAINS = {
    "merge": ["tune.between=merge"],
    "stack": ["tune.between=stack"],
    "merge whole": ["tune.between=merge", f"tune.modules_to_save={WHOLE}"],
    "stack whole": ["tune.between=stack", f"tune.modules_to_save={WHOLE}"],
}


@pytest.fixture(scope="module")
def chains(toy, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    return {name: Chain(toy, store, *overrides) for name, overrides in CHAINS.items()}


@pytest.mark.parametrize("name", CHAINS)
def test_margins_are_zero_at_every_start(chains, name):
    """Pitfall T2 (see test_pitfalls.py): three steps with adapters."""
    tolerance = 0.0 if "merge" in name else 1e-5
    for step in chains[name].steps:
        first, *later = step.entries
        assert abs(first["margin"]) <= tolerance and first["loss"] == pytest.approx(np.log(2), abs=1e-6)
        assert max(abs(entry["margin"]) for entry in later) > 0.1


@pytest.mark.parametrize("beside", ["", " whole"])
def test_merging_and_stacking_give_the_same_log_probs(chains, beside):
    merged, stacked = (chains[between + beside].logps_N2 for between in ("merge", "stack"))
    for ours, theirs in zip(merged, stacked, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    for earlier, later in zip(merged, merged[1:], strict=False):
        assert np.abs(later - earlier).max() > 0.5


@as_peft_reads_it
@pytest.mark.parametrize("name", CHAINS)
def test_peft_gets_the_step_s_model_from_its_adapter_and_base(chains, name):
    check_adapters(chains[name], stacked="stack" in name)


@pytest.mark.parametrize("name", CHAINS)
def test_a_base_in_bf16_is_mapped_and_its_adapter_is_that_of_one_in_fp32(chains, monkeypatch, tmp_path, name):
    """The factors are drawn in fp32 either way, and the engine casts the base."""
    spec = chains[name].steps[2].spec
    if "merge" in name:
        spec = replace(spec, start=spec.history[0], history=spec.history[:1])
    base = adapters.spec_for(bind(tune, spec.config.tune)(), spec.start, spec.history)
    (tmp_path / "bf16").mkdir()
    shutil.copy(base.base.folder / "config.json", tmp_path / "bf16")
    stored = {key: tensor.bfloat16() for key, tensor in load_file(base.base.folder / "model.safetensors").items()}
    save_file(stored, tmp_path / "bf16" / "model.safetensors", metadata={"format": "pt"})
    rounded = base._replace(base=base.base._replace(folder=tmp_path / "bf16"))
    loading, load = adapters.Loading(False, torch.float32, torch.device("cpu")), hub.load
    found = adapters.load(rounded, 0, loading)
    monkeypatch.setattr(hub, "load", lambda folder, remote, as_stored: load(folder, remote))
    expected = dict(adapters.load(rounded, 0, loading).named_parameters())
    assert {name: param.dtype for name, param in found.named_parameters()} == {
        name: torch.float32 if ".lora_" in name or param.requires_grad else torch.bfloat16
        for name, param in expected.items()
    }
    for name, param in found.named_parameters():
        assert torch.equal(param.float(), expected[name]) and param.requires_grad == expected[name].requires_grad


@as_peft_reads_it
def test_tied_embeddings_are_trained_and_written_as_one(toy, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(toy / "model", model)
    random_model(tie_word_embeddings=True).save_pretrained(model)
    overrides = [f"model.path={model}", "tune.between=stack", "tune.modules_to_save=[lm_head]"]
    chain = Chain(toy, tmp_path / "store", *overrides)
    assert chain.adapter(3)[0].modules_to_save == ["lm_head", "model.embed_tokens"]
    assert not torch.equal(*(chain.weights(t)["model.embed_tokens.weight"] for t in (0, 3)))
    check_adapters(chain, stacked=True)


def check_adapters(chain, stacked):
    """Every step's adapter, added by peft to the base that it names, gives the step's model."""
    by_key = {model.key: model for model in chain.models}
    for t in (1, 2, 3):
        base = by_key[chain.adapter(t)[0].base_model_name_or_path]
        assert base is chain.models[0 if stacked else t - 1]
        adapted = PeftModel.from_pretrained(hub.load(base.folder), chain.models[t].folder / "adapter")
        expected = chain.logps_N2[t]
        with torch.no_grad():
            found = [list(naive_logprobs(adapted.base_model.model, row)) for row in chain.rows]
        np.testing.assert_allclose(np.array(found), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "whole"), [("merge", []), ("stack whole", WHOLE)])
def test_the_steps_weights_are_plain_models_in_which_only_the_targets_changed(chains, name, whole):
    before, after = chains[name].weights(0), chains[name].weights(3)
    assert before.keys() == after.keys()
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", *whole}


def test_two_adapters_side_by_side_add_up():
    first_a, first_b = torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0], [6.0]])
    second_a, second_b = torch.tensor([[3.0, 4.0]]), torch.tensor([[7.0], [8.0]])
    both_a = adapters.concatenated("q_proj.lora_A.weight", first_a, second_a, rank=1)
    both_b = adapters.concatenated("q_proj.lora_B.weight", first_b, second_b, rank=1)
    assert (both_b @ both_a).tolist() == [[5 + 21, 10 + 28], [6 + 24, 12 + 32]]


def test_the_stacked_adapter_holds_the_adapters_of_all_steps_at_their_own_scale(chains):
    chain, name = chains["stack"], "model.layers.1.mlp.up_proj"
    settings, weights = chain.adapter(3)
    assert (settings.r, settings.lora_alpha) == (3 * RANK, 3 * ALPHA)
    a, b = (weights[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
    parts = [b[:, rows] @ a[rows] for rows in (slice(RANK * i, RANK * (i + 1)) for i in range(3))]
    added = chain.weights(3)[f"{name}.weight"] - chain.weights(0)[f"{name}.weight"]
    torch.testing.assert_close(added, ALPHA / RANK * sum(parts), atol=1e-6, rtol=0)
    earlier = chain.adapter(2)[1]
    assert torch.equal(a[: 2 * RANK], earlier[f"base_model.model.{name}.lora_A.weight"])
    assert not torch.allclose(a[:RANK], a[RANK : 2 * RANK], atol=0.1)  # each step draws another A


def test_the_lineage_names_base_and_start(chains):
    chain = chains["stack"]
    lineage = json.loads((chain.models[2].folder / "adapter" / "lineage.json").read_text())
    assert lineage == {"base": chain.models[0].key, "start": chain.models[1].key, "num_adapters": 2}


def test_the_rank_is_part_of_the_key(run):
    quick = ["tune=lora", "split=all_at_once", "optim.pairs_per_update=99"]
    folders = [run(*quick, f"tune.rank={rank}", name=f"rank {rank}") for rank in (1, 2)]
    keys = {json.loads((folder / "manifest.json").read_text())["steps"][0]["key"] for folder in folders}
    assert len(keys) == 2


def check_two_ranks(one, two, stage):
    """Run `one` again in the folder `two`, on two ranks at a ZeRO stage, with the same losses. Returns the folder."""
    settings = config.load(one / "config.yaml")
    settings.launch.ranks, settings.deepspeed.stage = 2, stage
    ranks.finish(two, ranks.start(settings, two, os.environ["SDPO_STORE"]))
    losses = [[entry["loss"] for entry in read_lines(folder, "train")] for folder in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    return two


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 1, 2, 3])
def test_two_ranks_train_the_same_adapters_at_every_zero_stage(run, tmp_path, stage):
    overrides = [*LORA, *CHAINS["stack whole"], "split=random", "split.num_chunks=2", "launch.device=cpu"]
    overrides += ["reference=mixed", "reference.alpha=0.6", "reference.updates=3"]
    two = check_two_ranks(run(*overrides), tmp_path / "two", stage)
    adapter = load_file(two / "steps/2/adapter/adapter_model.safetensors")
    assert {min(tensor.shape) for name, tensor in adapter.items() if ".lora_" in name} == {2 * RANK}


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_chain_starts_from_weights_rounded_to_4_bits(toy, tmp_path):
    pytest.importorskip("bitsandbytes")
    chain = Chain(toy, tmp_path / "store", "tune.between=stack", "tune.quantize=4bit")
    for step in chain.steps:
        assert abs(step.entries[0]["margin"]) <= 1e-5
    runner = toys.prepare(toy, tmp_path / "store", *LORA)[1].runner
    twice = adapters.rounded(chain.models[0], runner.loading, runner.store, runner.tokenizer)
    for name, tensor in load_file(twice.folder / "model.safetensors").items():
        assert torch.equal(tensor, chain.weights(0)[name])


def test_a_reference_that_moves_every_update_is_the_policy(run):
    folder = run(*LORA, "split=all_at_once", "reference=periodic", "reference.updates=1")
    most = 0 if rounds_rows_alike() else 1e-6
    assert max(abs(entry["margin"]) for entry in read_lines(folder, "train")) <= most


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # peft warns, and sets it
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # gpt2's layers keep their weights transposed
def test_a_mixed_reference_is_the_mean_of_merged_weights(run, toy, tmp_path, architecture):
    """Its difference to S has two and three times an adapter's rank, so the mean of factors would be another model."""
    model = tmp_path / "model"
    shutil.copytree(toy / "model", model)
    initial = random_model(architecture)
    initial.save_pretrained(model)
    every = [*LORA, "split=all_at_once", "optim.schedule=constant", "optim.warmup=0", "optim.pairs_per_update=33"]
    every += [f"model.path={model}", "reference=mixed", "reference.updates=2", "reference.alpha=0.6"]
    reference = dict(initial.state_dict())
    for epochs in (1, 2):  # of two updates each; the reference has not moved after the first window
        folder = run(*every, f"optim.epochs={epochs}", name=f"{epochs} epochs")
        policy = hub.load(folder / "steps" / "1").state_dict()
        reference = {name: 0.4 * tensor + 0.6 * policy[name] for name, tensor in reference.items()}
    folder = run(*every, "optim.epochs=3", name="3 epochs")
    initial.load_state_dict(reference)
    _, start = toys.prepare(toy, tmp_path / "store", f"model.path={model}", "data.held_out_share=0.1")
    read = pd.read_parquet(folder / "steps" / "1" / "reference.parquet").set_index("id")
    with torch.no_grad():
        expected = [list(naive_logprobs(initial, row)) for row in start.train.rows]
    found = read.loc[[row.id for row in start.train.rows]].to_numpy()
    np.testing.assert_allclose(found, np.array(expected), atol=2e-4, rtol=0)


def test_dropout_is_off_in_the_margin_gate_and_the_same_after_an_interruption(run, toy, monkeypatch, tmp_path):
    class Killed(BaseException):
        pass

    model = tmp_path / "model"  # it has dropout too, which is on whenever the adapter's is
    shutil.copytree(toy / "model", model)
    random_model(attention_dropout=0.3).save_pretrained(model)
    overrides = [*LORA, "tune.dropout=0.5", "tune.between=stack", "split=random", "split.num_chunks=2"]
    overrides += ["launch.checkpoint_minutes=0", f"model.path={model}"]
    update, done = engine.Plain.update, []

    def interrupted(self, lr):
        done.append(lr)
        if len(done) == 12:
            raise Killed
        return update(self, lr)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Plain, "update", interrupted)
        with pytest.raises(Killed):
            run(*overrides)
    resumed = run(*overrides)
    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "another"))
    whole = run(*overrides, name="whole")
    first = [entry["margin"] for entry in read_lines(whole, "train") if entry["update"] == 1]
    assert len(first) == 2 and all(abs(margin) > 1e-3 for margin in first)
    for name in ("model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (resumed / "steps/2" / name).read_bytes() == (whole / "steps/2" / name).read_bytes()
