"""Settings of adapters: what is refused by which sentence, and what is said of the weights that are adapted."""

import shutil

import pytest
import torch
from conftest import compose, random_model
from test_adapters import LORA, as_peft_reads_it

from sdpo import validate
from sdpo.errors import UserError
from sdpo.model import hub
from sdpo.model.lora import adapters
from sdpo.model.lora.targets import describe, find_targets
from sdpo.store.artifacts import Artifact
from sdpo.variants import tune

REFUSED = {
    "would score rounded ones": ["tune.between=stack", "save_dtype=bf16"],
    "nothing to carry": ["optim.moments=carry"],
    "4bit needs tune.between=stack": ["tune.quantize=4bit"],
    "4bit needs bitsandbytes": ["tune.quantize=4bit", "tune.between=stack"],
    "it can be merge, stack": ["tune.between=sum"],
    "it can be none, 4bit": ["tune.quantize=8bit"],
    "rank must be at least 1": ["tune.rank=0"],
    "alpha must be above 0": ["tune.alpha=0"],
    "dropout must be at least 0 and below 1": ["tune.dropout=1.0"],
    "targets is empty": ["tune.targets=[]"],
    "unknown key ranks": ["+tune.ranks=3"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_contradict_adapters_are_refused_at_composition(message, monkeypatch):
    monkeypatch.setattr(tune, "find_spec", lambda name: None)
    files = ["model=local", "model.path=m", "data=local", "data.train=[a.jsonl]"]
    with pytest.raises(UserError, match=message):
        validate.check(compose(*files, "tune=lora", *REFUSED[message]))


def test_a_mixed_reference_is_refused_with_4_bit_weights(monkeypatch):
    monkeypatch.setattr(tune, "find_spec", lambda name: name)
    quantised = ["tune=lora", "tune.quantize=4bit", "tune.between=stack", "reference=mixed", "reference.alpha=0.6"]
    with pytest.raises(UserError, match="reference=mixed changes the frozen weights, which tune.quantize=4bit holds"):
        validate.check(compose("model=local", "model.path=m", "data=local", "data.train=[a.jsonl]", *quantised))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_only_linear_layers_of_the_body_are_targets(run, target):
    with pytest.raises(UserError, match=rf"tune.targets names (model\.)?{target}"):
        run("tune=lora", f"tune.targets=[q_proj,{target}]")


@pytest.mark.parametrize(
    ("module", "message"),
    [("head", "does not have"), ("mlp", "holds adapters"), ("q_proj", "holds adapters"), ("base_layer", "does not")],
)
def test_only_existing_modules_without_adapters_are_trained_whole(run, module, message):
    with pytest.raises(UserError, match=f"tune.modules_to_save names {module}, which .*{message}"):
        run("tune=lora", f"tune.modules_to_save=[{module}]")


def test_a_misspelt_target_among_right_ones_is_refused(run):
    with pytest.raises(UserError, match="tune.targets names v_porj, which LlamaForCausalLM does not have"):
        run("tune=lora", "tune.targets=[q_proj,v_porj]")


MAMBA = {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 16, "expand": 2}


@as_peft_reads_it
def test_layers_of_mamba_that_peft_refuses_are_left_out_and_named(tmp_path, capsys):
    """Its kernels read the weight of out_proj themselves, so that an adapter on it would do nothing."""
    random_model("mamba2", **MAMBA).save_pretrained(tmp_path)
    adapter = tune.Adapter(2, 4.0, 0.0, ["all-linear"], [], "merge", "none")
    spec = adapters.spec_for(adapter, Artifact("S", tmp_path, reused=True), [])
    loading = adapters.Loading(False, torch.float32, torch.device("cpu"))
    model = adapters.load(spec, 0, loading)
    said, total = capsys.readouterr().err, hub.count_weights(tmp_path)
    frozen = 2 * (96 * 4 + 64 * 32) / total
    assert "adapts in_proj (" in said and f"leaves mixer.conv1d.weight, out_proj frozen ({frozen:.1%})" in said
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    assert trained and all(".in_proj.lora_" in name for name in trained)
    merged = adapters.save_and_merge(spec, trained, tmp_path / "step", trust_remote_code=False)
    assert merged.state_dict().keys() == hub.load(tmp_path).state_dict().keys()
    with pytest.raises(UserError, match="tune.targets names backbone.layers.0.mixer.out_proj, which peft does not"):
        adapters.load(spec._replace(adapter=adapter._replace(targets=["in_proj", "out_proj"])), 0, loading)


def described(architecture, **settings):
    """What is said of all-linear, and the model."""
    with torch.device("meta"):
        model = random_model(architecture, num_local_experts=4, num_experts_per_tok=2, **settings)
    adapter = tune.Adapter(2, 4.0, 0.0, ["all-linear"], [], "merge", "none")
    total = sum(param.numel() for param in model.parameters())
    return describe(model, adapter, find_targets(model, adapter.targets), [], total), total


def test_experts_that_are_not_recognised_are_said_to_stay_frozen():
    """By hand: JetMoE has 4 experts of 2 x 48 x 32 and 32 x 48 in each of 2 layers; its routers are linear layers."""
    said, total = described("jetmoe", kv_channels=8)
    frozen = 2 * 4 * (2 * 48 * 32 + 32 * 48) / total
    assert said.endswith(f", leaves mlp.input_linear.weight, mlp.output_linear.weight frozen ({frozen:.1%})")
    assert "adapts experts.input_linear.weight, experts.output_linear.weight, " in said
    said, total = described("mixtral")  # its routers of 4 x 32, in no linear layer, are less than 1 % of the weights
    assert "frozen" not in said and 2 * 4 * 32 / total < 0.01


def test_what_is_adapted_is_said_once(run, toy, tmp_path, capsys):
    """Weights: two embeddings of 300 x 32, and in each of two layers q and o of 32 x 32, k and v of 16 x 32, a router
    of 4 x 32 that is no linear layer, three projections of 48 x 32 in each of 4 experts, two norms; one norm more."""
    model = tmp_path / "model"
    shutil.copytree(toy / "model", model)
    random_model("mixtral", num_local_experts=4, num_experts_per_tok=2).save_pretrained(model)
    run(*LORA, f"model.path={model}", "tune.modules_to_save=[lm_head]", "optim.epochs=1")
    total = 2 * 300 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 4 * 32 + 3 * 4 * 48 * 32 + 2 * 32) + 32
    adapted, whole = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 4 * 48 * 32) / total, 300 * 32 / total
    said = [line for line in capsys.readouterr().err.splitlines() if "tune=lora" in line]
    assert said == [
        "tune=lora adapts experts.down_proj, experts.gate_up_proj, k_proj, o_proj, q_proj, v_proj "
        f"({adapted:.1%} of the weights), trains lm_head whole ({whole:.1%})"
    ]
