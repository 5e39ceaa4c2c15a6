"""Every loss against numbers worked by hand, and properties of all losses.

The first pair has rewards ln 2 (chosen) and -ln 1.5 (rejected) at beta 0.5, so that sigmoids are fractions: 2/3 of the
chosen reward, 2/5 of the rejected one, 3/4 of their difference ln 3. The second pair has margin 0.
"""

from functools import partial
from math import e, log

import pytest
import torch
from conftest import CHECKOUT, read_lines
from omegaconf import OmegaConf

from sdpo.binding import bind, inputs_of, variants
from sdpo.errors import UserError
from sdpo.types import ChosenRejected
from sdpo.variants import loss as losses

CONF = CHECKOUT / "conf" / "loss"


def both(chosen, rejected):
    return ChosenRejected(torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64))


REFERENCE = both([-10, -12], [-12, -10])
DATA = {
    "policy": both([-10 + 2 * log(2), -12], [-12 - 2 * log(1.5), -10]),
    "reference": REFERENCE,
    "lengths": both([2, 4], [4, 2]),
    "ratings": both([5, 4], [3, 3]),
    "divergence": both([log(3), 1], [log(3) + 4 * log(1.5), 1]),
}
HALF = {"beta": 0.5}
OF = [{"name": "dpo", "weight": 1.0, "beta": 0.1}, {"name": "sft", "weight": 0.2}]
NLL = (10 - 2 * log(2), 12)  # of the chosen responses, of 2 and 4 tokens


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("dpo", HALF, [log(4 / 3), log(2)]),
        ("dpo", HALF | {"label_smoothing": 0.1}, [0.9 * log(4 / 3) + 0.1 * log(4), log(2)]),
        ("robust", HALF | {"label_smoothing": 0.1}, [(0.9 * log(4 / 3) - 0.1 * log(4)) / 0.8, log(2)]),
        ("ipo", HALF | {"over_tokens": "sum"}, [(2 * log(3) - 1) ** 2, 1]),
        ("ipo", HALF, [(log(2) + log(1.5) / 2 - 1) ** 2, 1]),
        ("hinge", {"beta": 0.25}, [1 - log(3) / 2, 1]),
        ("hinge", HALF, [0, 1]),
        ("exo", HALF | {"label_smoothing": 0.25}, [0, log(4 / 3) / 2]),  # the policy's preference 3/4 is the label's
        ("nca", HALF, [-log(2 / 3) - log(1 / 3) / 2 - log(3 / 5) / 2, 2 * log(2)]),
        ("sppo_hard", HALF, [(2 * log(2) - 1) ** 2 + (1 - 2 * log(1.5)) ** 2, 2]),
        ("apo_zero", HALF, [1 / 3 + 2 / 5, 1]),
        ("apo_down", HALF, [2 / 3 + 1 / 4, 1]),
        ("discopop", HALF | {"tau": 0.5}, [0.1 * log(4 / 3) + 0.9 / 3, log(2) / 2 + 1 / 2]),  # mixed 9 to 1
        ("hypo", HALF, [log(4 / 3), log(1 + e)]),  # the second gamma_ref, -2, counts as 0
        ("odpo", HALF | {"alpha": 1.0}, [-log(3 / 5), log(2)]),  # gaps 2 and 1
        ("dpop", HALF | {"penalty": 5.0}, [log(4 / 3), log(2)]),  # no chosen response became less likely
        ("rpo", HALF | {"alpha": 0.2}, [log(4 / 3) + 0.1 * NLL[0], log(2) + 0.05 * NLL[1]]),
        (
            "rpo",
            HALF | {"alpha": 0.2, "over_tokens": "sum"},
            [log(4 / 3) + 0.2 * NLL[0], log(2) + 0.2 * NLL[1]],
        ),
        ("sampo", HALF, [log(4 / 3), log(2)]),  # on sums that were weighted before
        ("ld_dpo", HALF | {"alpha": 0.3}, [log(4 / 3), log(2)]),
        ("tdpo1", HALF, [log(7 / 4), log(2)]),  # the divergences take 2 ln 1.5 off ln 3
        ("tdpo2", HALF | {"alpha": 0.5}, [log(3 / 2), log(2)]),
        ("sft", {}, [NLL[0] / 2, NLL[1] / 4]),
        ("sft", {"over_tokens": "sum"}, NLL),
    ],
)
def test_by_hand(name, settings, expected):
    loss = bind(losses, {"name": name} | settings)
    torch.testing.assert_close(call(loss, DATA), torch.tensor(expected, dtype=torch.float64))


def test_a_mixture_is_the_weighted_sum_and_reads_what_its_parts_read():
    parts = [{"name": "dpo", "weight": 2, **HALF}, {"name": "sft", "weight": 0.5}]
    loss = bind(losses, {"name": "mixture", "of": parts})
    assert inputs_of(loss) == ["policy", "reference", "lengths"]
    expected = torch.tensor([2 * log(4 / 3) + NLL[0] / 4, 2 * log(2) + NLL[1] / 8], dtype=torch.float64)
    torch.testing.assert_close(call(loss, DATA), expected)
    alone = bind(losses, {"name": "mixture", "of": parts[1:]})
    assert inputs_of(alone) == ["policy", "lengths"]  # no reference, so none is computed
    assert alone.keywords == {"of": [{"name": "sft", "weight": 0.5, "over_tokens": "mean"}]}  # what the key holds
    twice = bind(losses, {"name": "mixture", "of": [parts[0], parts[0] | {"beta": 1.0}]})  # margin 2 ln 3: 9/10
    torch.testing.assert_close(call(twice, DATA)[0].item(), 2 * log(4 / 3) + 2 * log(10 / 9))


def test_a_mixture_of_a_loss_with_itself_trains_like_that_loss(run):
    half = "{name: dpo, weight: 0.5, beta: 0.1}"
    mixed = run("loss=mixture", f"loss.of=[{half}, {half}]", name="mixed")
    losses_of = [[entry["loss"] for entry in read_lines(folder, "train")] for folder in (run(name="alone"), mixed)]
    assert losses_of[1] == pytest.approx(losses_of[0], rel=1e-6)
    assert {entry["lambda_mean"] for entry in read_lines(mixed, "train")} == {None}


@pytest.mark.parametrize(
    ("of", "sentence"),
    [
        ([], "mixture: of is empty"),
        ([{"name": "sft"}], "has no number as its weight"),
        ([{"name": "sft", "weight": True}], "has no number as its weight"),
        ([{"name": "dpo", "weight": 1}], "dpo: beta has no value"),
        ([{"name": "sft", "weight": 1, "beta": 1}], "sft: unknown key beta"),
        ([{"name": "dop", "weight": 1}], "has no 'dop'; it has dpo"),
        ("dpo", "mixture: of"),
    ],
)
def test_a_mixture_that_cannot_be(of, sentence):
    with pytest.raises(UserError, match=sentence):
        bind(losses, {"name": "mixture", "of": of})


def test_by_hand_without_reference():
    policy, lengths = both([2 * log(1 / 2)], [4 * log(1 / 4)]), both([2], [4])  # per token 1/2 and 1/4
    expected = partial(torch.testing.assert_close, rtol=1e-12, atol=0)
    expected(losses.orpo(policy, lengths, beta=0.1).item(), log(2) + 0.1 * log(4 / 3))  # odds 1 and 1/3
    expected(losses.simpo(policy, lengths, beta=2, target_margin=log(4 / 3)).item(), log(4 / 3))
    expected(losses.cpo(policy, lengths, beta=0.5, alpha=3).item(), log(9 / 8) + 3 * log(2))
    expected(losses.cpo(policy, lengths, beta=0.5, alpha=3, over_tokens="sum").item(), log(9 / 8) + 6 * log(2))


def test_dpop_penalises_a_chosen_response_that_becomes_less_likely():
    policy, reference = both([-10 - log(2)], [-12 - log(2) - 2 * log(3)]), both([-10], [-12])
    loss = losses.dpop(policy, reference, beta=0.5, penalty=2 * log(3) / log(2))
    assert loss.item() == pytest.approx(log(2))  # the penalty is as large as the margin


def test_dpo_gradient_is_beta_lambda_and_finite_for_large_margins():
    policy = ChosenRejected(*(x.clone().requires_grad_() for x in both([0, 5000], [2 * log(3), -5000])))
    losses.dpo(policy, both([0, 0], [0, 0]), beta=0.5).sum().backward()
    expected = torch.tensor([-0.5 * 3 / 4, 0], dtype=torch.float64)
    torch.testing.assert_close(policy.chosen.grad, expected)
    torch.testing.assert_close(policy.rejected.grad, -expected)


def test_tdpo2_holds_rejected_responses_alone():
    divergence = ChosenRejected(*(sums_B.clone().requires_grad_() for sums_B in DATA["divergence"]))
    losses.tdpo2(DATA["policy"], REFERENCE, divergence, beta=0.5, alpha=0.5).sum().backward()
    assert divergence.chosen.grad is None
    torch.testing.assert_close(divergence.rejected.grad, torch.tensor([1 / 12, 1 / 8], dtype=torch.float64))


@pytest.mark.parametrize("name", variants(losses))
def test_the_loss_of_a_pair_does_not_depend_on_other_pairs(name):
    loss = defaults(name)
    alone = [call(loss, {k: ChosenRejected(*(x[i : i + 1] for x in v)) for k, v in DATA.items()}) for i in range(2)]
    assert torch.equal(torch.cat(alone), call(loss, DATA))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dpo", HALF | {"label_smoothing": 0.5}, "below 0.5"),
        ("exo", HALF | {"label_smoothing": 0.0}, "above 0 for loss=exo"),
    ],
)
def test_settings_out_of_range(name, settings, message):
    with pytest.raises(UserError, match=message):
        call(bind(losses, {"name": name} | settings), DATA)


def test_odpo_refuses_ratings_that_contradict_the_labels():
    with pytest.raises(UserError, match="rated above"):
        call(defaults("odpo"), DATA | {"ratings": both([5, 3], [3, 3])})


def defaults(name):
    settings = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    return bind(losses, settings | ({"of": OF} if name == "mixture" else {}))


def call(loss, data):
    return loss(*(data[name] for name in inputs_of(loss)))
