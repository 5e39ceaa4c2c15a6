"""lambda worked by hand, for DPO and for other losses."""

import math

import numpy as np
import pytest
from conftest import compose, read_lines

from sdpo.binding import bind
from sdpo.train import gradient_weight
from sdpo.variants import loss as losses

BETA = 0.5
POLICY = np.array([[-4.0, -7.0], [-5.0, -4.0]])  # gamma 3, -1
REFERENCE = np.array([[-5.0, -6.0], [-3.0, -4.0]])  # gamma_ref 1, 1: margins 2, -2
DATA = {
    "policy": POLICY,
    "reference": REFERENCE,
    "lengths": np.array([[2, 4], [5, 8]]),
    "ratings": np.array([[3.0, 1.0], [3.0, 2.0]]),
}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


EXPECTED = {
    "dpo": ({}, [sigmoid(-1), sigmoid(1)]),  # -beta * margin is -1, 1
    "dpo, labels smoothed": ({"name": "dpo", "label_smoothing": 0.1}, [sigmoid(-1) - 0.1, sigmoid(1) - 0.1]),
    "hinge": ({}, [0, 1]),  # beta * margin is 1 and -1: at the corner the slope is 0
    "rpo": ({"alpha": 1.0}, [sigmoid(-1), sigmoid(1)]),  # the NLL term reads the chosen response only
    "hypo": ({}, [sigmoid(-1), sigmoid(1)]),  # gamma_ref is positive, so it is not clipped
    "odpo": ({"alpha": 1.0}, [sigmoid(-1 + math.log(2)), sigmoid(1)]),  # rating gaps 2, 1
    "ipo": ({"over_tokens": "sum"}, [2 * (1 - 2) / BETA, 2 * (1 + 2) / BETA]),  # 1 / (2 beta) is 1
}


@pytest.mark.parametrize("case", EXPECTED)
def test_lambda_is_the_derivative_of_the_loss_itself(case):
    settings, expected = EXPECTED[case]
    loss = bind(losses, {"name": case, "beta": BETA} | settings)
    assert gradient_weight.of_pairs(loss, **DATA) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["simpo", "sft"])
def test_without_a_reference_there_is_no_lambda(name):
    assert gradient_weight.of_pairs(bind(losses, compose(f"loss={name}").loss), **DATA) is None


def test_a_run_records_the_weights_of_its_own_loss(run):
    quick = ["split=all_at_once", "optim.pairs_per_update=99"]
    folder = run(*quick, "loss=ipo", "loss.over_tokens=sum", name="ipo")
    (first,) = read_lines(folder, "train")
    assert first["lambda_mean"] == pytest.approx(1 / compose("loss=ipo").loss["beta"] ** 2)  # at margin 0
    assert read_lines(folder, "step")[0]["reference_leverage"] == 0.0  # the reference is S
    folder = run(*quick, "loss=simpo", name="simpo")
    for entry in (read_lines(folder, "train")[0], read_lines(folder, "step")[0]):
        assert entry["lambda_mean"] is None and entry["lambda_std"] is None
    assert read_lines(folder, "step")[0]["reference_leverage"] is None
