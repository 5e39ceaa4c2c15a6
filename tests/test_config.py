"""The typed configuration: which values are refused with which message, and what a run folder keeps."""

import pytest
import torch
from conftest import compose
from omegaconf import OmegaConf

from sdpo import config, distributed, validate
from sdpo.errors import UserError


def composed(**changes):
    """A complete configuration before it is typed; `optim__lr=1` changes the value of a key."""
    base = OmegaConf.create(
        {
            "model": {"name": "local", "path": "m"},
            "data": {"name": "local", "train": ["a.jsonl"]},
            "loss": {"name": "dpo", "beta": 0.1},
            "steps": {"2": {"optim": {"lr": 0.5}, "loss": {"beta": 0.2}}},
        }
    )
    for key, value in changes.items():
        OmegaConf.update(base, key.replace("__", "."), value, force_add=True)
    return base


def test_a_run_folder_keeps_the_configuration_whole(tmp_path):
    given = config.from_composed(composed(seed=3, data__revisions={"org/name": "abc"}))
    (tmp_path / "config.yaml").write_text(config.to_yaml(given))
    assert config.load(tmp_path / "config.yaml") == given
    assert (given.seed, given.optim.lr) == (3, 5e-7)
    assert given.steps == {2: {"optim": {"lr": 0.5}, "loss": {"beta": 0.2}}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"typo": 1}, "unknown key typo; the configuration has model, data"),
        ({"optim__rate": 1}, "unknown key optim.rate; optim has lr, schedule"),
        ({"model__sft": {"rate": 1}}, "unknown key model.sft.rate; model.sft has lr"),
        ({"optim__lr": "fast"}, "optim.lr: Value 'fast'"),
        ({"optim": 3}, "int is not a subclass of Optim"),
        ({"start": "first"}, "start is 'first'; it can be previous, initial"),
        ({"deepspeed__stage": 4}, "deepspeed.stage is 4; it can be null, 1, 2, 3"),
        ({"optim__warmup": 1.5}, "optim.warmup is 1.5; it must be from 0 to 1"),
        ({"launch__ranks": 0}, "launch.ranks is 0; it must be at least 1"),
        ({"data__lab__sources": {"a": {"flipped": 2}}}, "data.lab.sources.a.flipped is 2.0; it must be from 0 to 1"),
        ({"data__on_bad_row": "drop"}, "data.on_bad_row is 'drop'; it can be error, skip"),
        ({"data__source_from": "column"}, "data.source_from is 'column'; it can be file, row"),
        ({"data__on_long": "cut"}, "data.on_long is 'cut'; it can be error, drop, truncate_prompt, truncate_response"),
        ({"data__train": []}, "data.train has no value; set data.train=[...]"),
        ({"model__path": None}, "model.path has no value; set model.path=..."),
        ({"loss__beta": "???"}, "loss.beta has no value; set loss.beta=..."),
        ({"model__path": "${nowhere}"}, "model.path: Interpolation key 'nowhere' not found"),
        ({"steps": {"0": {}}}, "steps.0: steps are counted from 1"),
        ({"steps": {"2": {"seed": 1}}}, "steps.2.seed: a step can change optim, loss, reference, start, nothing else"),
        ({"steps": {"2": {"optim": {"rate": 1}}}}, "steps.2: unknown key optim.rate; optim has lr"),
        ({"steps": {"2": {"optim": {"epochs": 0}}}}, "steps.2.optim.epochs is 0; it must be at least 1"),
    ],
)
def test_an_invalid_value_is_an_error_of_one_line(changes, sentence):
    with pytest.raises(UserError, match="^[^\n]*$") as error:
        config.from_composed(composed(**changes))
    assert sentence in str(error.value)


def test_a_step_sees_its_own_overrides_and_no_other():
    whole = config.from_composed(composed())
    assert config.for_step(whole, 1) == whole
    second = config.for_step(whole, 2)
    assert (second.optim.lr, second.loss) == (0.5, {"name": "dpo", "beta": 0.2})
    assert (whole.optim.lr, whole.loss) == (5e-7, {"name": "dpo", "beta": 0.1})


def test_a_step_with_another_loss_has_that_loss_s_settings_alone():
    other = {"name": "simpo", "beta": 2.5, "target_margin": 1.2}
    whole = config.from_composed(composed(steps={"1": {"loss": other}, "2": {"loss": {"name": "dpo", "beta": 0.2}}}))
    assert [config.for_step(whole, t).loss for t in (1, 2, 3)] == [other, {"name": "dpo", "beta": 0.2}, whole.loss]


def test_only_the_laboratory_s_model_is_trained_first():
    other = compose("model=local", "model.path=m", "data=local", "data.train=[a.jsonl]")
    other.model.sft = config.Optim()
    with pytest.raises(UserError, match="model.sft trains the laboratory's S; another model is taken as it is"):
        validate.check(other)


def test_the_laboratory_chooses_the_cpu_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    real = ["model=local", "model.path=m", "data=local", "data.train=[a.jsonl]"]
    found = [distributed.device(compose(*chosen).launch.device).type for chosen in ([], real, ["launch.device=cuda"])]
    assert found == ["cpu", "cuda", "cuda"]


def test_asking_for_a_gpu_does_not_start_cuda(monkeypatch):
    """Runs that are forked later could not use it: PyTorch must ask the driver (`device_count`) instead."""
    monkeypatch.setattr(torch.cuda, "_is_compiled", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delattr(torch._C, "_cuda_getDeviceCount", raising=False)
    assert distributed.device().type == "cuda"
