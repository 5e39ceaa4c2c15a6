"""deepspeed.config: DeepSpeed's own settings reach its engine and the keys; those that we decide are refused."""

import json

import forked
import numpy as np
import pytest
import torch
from conftest import compose, random_model

from sdpo import distributed, validate
from sdpo.config import Deepspeed, Optim, load, to_yaml
from sdpo.errors import UserError
from sdpo.model import zero
from sdpo.model.engine import open_engine
from sdpo.model.logprobs import Scorer
from sdpo.model.packing import pack
from sdpo.train.numerics import Numerics
from sdpo.types import TokenPair

GIVEN = {"zero_optimization": {"reduce_bucket_size": 4096, "overlap_comm": True}, "wall_clock_breakdown": False}


def nested(key, value=1):
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


@pytest.mark.parametrize("key", zero.OWNED)
def test_a_key_that_another_setting_decides_is_refused_by_name(key):
    with pytest.raises(UserError, match=rf"^deepspeed\.config\.{key} cannot be set, because "):
        zero.check_settings(Deepspeed(stage=2, config=nested(key)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["deepspeed=off", "deepspeed.config={aio: {}}"], "deepspeed.config is not read with deepspeed=off"),
        (["deepspeed.config={zero_optimization: {offload_param: {}}}"], "offload_param needs deepspeed.offload=true"),
        (
            ["deepspeed.offload=true", "deepspeed.config={zero_optimization: {offload_optimizer: {device: nvme}}}"],
            "zero_optimization.offload_optimizer.device can be cpu alone",
        ),
        (["deepspeed.config=nowhere.json"], "deepspeed.config=nowhere.json cannot be read as JSON"),
    ],
)
def test_what_cannot_work_is_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        validate.check(compose("deepspeed=zero2", *overrides))


def test_the_settings_of_a_file_are_those_of_a_mapping_and_in_the_key(tmp_path):
    (tmp_path / "own.json").write_text(json.dumps(GIVEN))
    plain, given, from_file = (
        compose("deepspeed=zero2", *more)
        for more in (
            [],
            ["deepspeed.config=" + json.dumps(GIVEN).replace('"', "")],
            [f"deepspeed.config={tmp_path / 'own.json'}"],
        )
    )
    assert given == from_file and given.deepspeed.config == GIVEN
    (tmp_path / "config.yaml").write_text(to_yaml(from_file))
    assert load(tmp_path / "config.yaml") == given  # the run folder does not need the file
    assert Numerics(plain).all["deepspeed"] == {"stage": 2, "offload": False}  # as before there was such a setting
    assert Numerics(given).all["deepspeed"] == {"stage": 2, "offload": False, "config": GIVEN}


def two_updates(stage, given):
    """What a rank's engine was set to, and the sums of its weights after two updates."""
    settings = Deepspeed(stage=stage, config=given)
    try:
        engine = open_engine(Scorer(random_model(), "sdpa"), Optim(), "fp32", settings, torch.device("cpu"))
    except UserError as error:
        return str(error)
    tokens = np.arange(3, 33, dtype=np.int32).reshape(3, 10) + distributed.rank()
    for _ in range(2):
        for last in (False, True):
            policy = engine.module(pack([TokenPair("a", *tokens)]))
            engine.backward((policy.rejected - policy.chosen).sum(), last)
        engine.update(1e-3)
    used = engine.module._config.zero_config
    weights = {name: weight.sum().item() for name, weight in engine.weights(everywhere=True).items()}
    return (used.stage, used.reduce_bucket_size, used.overlap_comm), weights


def both(stage, given):
    found = forked.on_ranks(2, two_updates, stage, given)
    assert found[0] == found[1]
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_settings_reach_the_engine_and_buckets_change_no_bit(stage):
    """The sum of two ranks' gradients does not depend on an order."""
    (used, weights), (default, same) = both(stage, GIVEN), both(stage, {})
    assert used == (stage, 4096, True) and default[1] == 500_000_000
    assert weights == same


@pytest.mark.slow
def test_a_setting_that_deepspeed_does_not_know_is_named():
    assert "overlap_com" in both(2, {"zero_optimization": {"overlap_com": True}})
