"""Model folders that cannot be used are refused by one sentence; what is saved says its dtype; casts."""

import json
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, random_model
from safetensors.torch import load_file, save_file
from torch import nn

from sdpo.errors import UserError
from sdpo.model import hub


@pytest.fixture
def folder(tmp_path):
    random_model().save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_is_taken_even_if_the_model_is_sought_on_the_hub(toy):
    assert hub.locate(str(toy / "model"), None, on_hub=True) == toy / "model"


def locate(folder):
    return hub.locate(str(folder), None, on_hub=False)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors"])
def test_quantised_weights_are_refused(folder, method):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(UserError, match=rf"quantised weights \({method}\).*name the model that they were made from"):
        locate(folder)


@pytest.mark.parametrize(("beside", "held"), [(True, "beside whole weights"), (False, "holds only an adapter")])
def test_an_adapter_is_refused_beside_whole_weights_and_alone(folder, beside, held):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere"}))
    if not beside:
        (folder / "config.json").unlink()
    with pytest.raises(UserError, match=f"{held}.*merge_and_unload"):
        locate(folder)


def with_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(folder, value):
    name = "model.layers.1.mlp.up_proj.weight"
    with_weights(folder, lambda weights: weights[name][3].fill_(value))
    with pytest.raises(UserError, match=f"its weight {name} holds NaN or infinity"):
        hub.load(folder)


def test_weights_that_the_architecture_has_no_place_for_are_named(folder):
    with_weights(folder, lambda weights: weights.update({"model.layers.0.mlp.extra.weight": torch.ones(2)}))
    with pytest.raises(UserError, match="LlamaForCausalLM has no place for 1 of its weights, model.layers.0.mlp.extra"):
        hub.load(folder)


def test_buffers_that_choose_experts_are_saved_as_they_are(tmp_path):
    """transformers keeps the bias of this router as a buffer, which no optimiser sees; without it loads zeros."""
    sizes = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = random_model("glm4_moe", **sizes, n_group=1, topk_group=1, first_k_dense_replace=1)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    model.get_buffer(name).copy_(torch.tensor([0.0, 3.0, 0.1, 0.0]))
    weights = {key: param.detach().bfloat16() for key, param in model.named_parameters()}
    hub.save(model, weights, byte_tokenizer(), tmp_path)
    assert torch.equal(hub.load(tmp_path).get_buffer(name), model.get_buffer(name))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("in_memory", ["float32", "bfloat16"])
def test_the_saved_configuration_names_the_dtype_of_the_files(tmp_path, dtype, in_memory):
    model = random_model().to(getattr(torch, in_memory))
    state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in model.state_dict().items()}
    hub.save(model, state, byte_tokenizer(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    assert {str(tensor.dtype) for tensor in load_file(tmp_path / "model.safetensors").values()} == {f"torch.{dtype}"}
    hub.load(tmp_path)


@pytest.mark.parametrize(
    ("stored", "as_stored", "is_mapped"),
    [(torch.bfloat16, True, True), (torch.bfloat16, False, False), (torch.float32, True, True)],
)
def test_weights_in_the_dtype_of_their_file_are_mapped_and_not_copied(tmp_path, stored, as_stored, is_mapped):
    random_model().to(stored).save_pretrained(tmp_path)
    model = hub.load(tmp_path, as_stored=as_stored)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    ranges = [range(*(int(end, 16) for end in line[0].split("-"))) for line in maps]
    mapped = {any(param.data_ptr() in each for each in ranges) for param in model.parameters()}
    assert mapped == {is_mapped}
    assert {param.dtype for param in model.parameters()} == {stored if as_stored else torch.float32}
    for ours, theirs in zip(model.parameters(), hub.load(tmp_path).parameters(), strict=True):
        assert torch.equal(ours.float(), theirs)


def test_a_cast_changes_float_parameters_alone():
    module = nn.Linear(2, 1)
    module.packed = nn.Parameter(torch.tensor([3, 200], dtype=torch.uint8), requires_grad=False)  # as 4-bit weights are
    module.register_buffer("frequencies", torch.tensor([1 / 3]))
    hub.cast(module, torch.device("cpu"), torch.bfloat16)
    assert module.weight.dtype == module.bias.dtype == torch.bfloat16
    assert module.packed.dtype == torch.uint8 and module.packed.tolist() == [3, 200]
    assert module.frequencies.dtype == torch.float32
