"""The margin gate tells rounding, which may depend on a pair's pack, from a policy that is not the model scored."""

import math

import pytest
import torch
from conftest import needs_bf16, read_lines
from torch.nn import functional
from toys import swap_while_loading

from sdpo.errors import UserError

BF16 = ["split=all_at_once", "reference=previous", "precision=bf16", "evaluate=[]"]
pytestmark = needs_bf16


def round_otherwise(monkeypatch, when=lambda num_rows: True):
    """bf16 products whose sum is made of two halves, each rounded to bf16, at some numbers of rows."""
    whole = functional.linear

    def linear(rows, weight, bias=None):
        half = weight.shape[1] // 2
        if weight.dtype != torch.bfloat16 or not when(rows.shape[:-1].numel()):
            return whole(rows, weight, bias)
        return whole(rows[..., :half], weight[:, :half], bias) + whole(rows[..., half:], weight[:, half:])

    monkeypatch.setattr(functional, "linear", linear)


@pytest.fixture
def rounds_by_pack(monkeypatch):
    """Stands for a processor whose bf16 products depend on the number of rows, as those of AMX do."""
    round_otherwise(monkeypatch, lambda num_rows: num_rows % 2 == 1)


def test_a_processor_that_rounds_by_pack_trains_and_the_user_is_told_the_size(run, rounds_by_pack, capsys):
    folder = run(*BF16)
    assert "rounding: this processor's bf16 log-probs depend on a pair's pack" in capsys.readouterr().err
    first = read_lines(folder, "train")[0]["loss"]
    assert first != pytest.approx(math.log(2), abs=1e-7) and first == pytest.approx(math.log(2), abs=0.01)


@pytest.mark.parametrize("processor", ["exact", "rounds_by_pack"])
def test_a_swapped_tensor_is_caught(run, monkeypatch, request, processor):
    if processor == "rounds_by_pack":
        request.getfixturevalue(processor)
    run(*BF16)  # stores the log-probs of the right weights
    swap_while_loading(monkeypatch)
    with pytest.raises(UserError, match="the policy at the step's start is not the model that was scored"):
        run(*BF16, "loss.beta=0.2")


def test_log_probs_from_another_processor_are_used(run, monkeypatch, capsys):
    run(*BF16)
    assert "rounding" not in capsys.readouterr().err
    round_otherwise(monkeypatch)
    run(*BF16, "loss.beta=0.2")
    assert "or another processor scored the reference" in capsys.readouterr().err
