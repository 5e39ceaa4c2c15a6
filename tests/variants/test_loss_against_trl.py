"""Losses and gradients equal those of TRL's own trainers, on the same tiny models and batches.

Both chosen responses have the same length, because TRL takes the mean NLL over the tokens of a batch, not per pair.

Shape suffixes: S sequences (chosen, then rejected), B pairs, T tokens, V vocabulary.
"""

import pytest
import torch
from conftest import byte_tokenizer, random_model
from datasets import Dataset

from sdpo.binding import bind, inputs_of
from sdpo.types import ChosenRejected
from sdpo.variants import loss as losses
from sdpo.variants import token_weights

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's own warnings

PAIRS = [
    {"prompt": "a b", "chosen": " yes it", "rejected": " no"},
    {"prompt": "hello", "chosen": " yes we", "rejected": " nobody there"},
]
SMOOTH = {"beta": 0.1, "label_smoothing": 0.1}
MIXED = [
    {"name": "ipo", "weight": 0.5, "beta": 0.1},
    {"name": "hinge", "weight": 2.0, "beta": 0.1},
    {"name": "sft", "weight": 0.3},
]

# TRL's DPOTrainer: loss_type, loss_weights, and our name and settings
DPO_TRAINER = [
    (["sigmoid"], [1.0], "dpo", {"beta": 0.1}),
    (["robust"], [1.0], "robust", SMOOTH),
    (["ipo"], [1.0], "ipo", {"beta": 0.1}),
    (["hinge"], [1.0], "hinge", {"beta": 0.1}),
    (["exo_pair"], [1.0], "exo", SMOOTH),
    (["nca_pair"], [1.0], "nca", {"beta": 0.1}),
    (["sppo_hard"], [1.0], "sppo_hard", {"beta": 0.1}),
    (["apo_zero"], [1.0], "apo_zero", {"beta": 0.1}),
    (["apo_down"], [1.0], "apo_down", {"beta": 0.1}),
    (["discopop"], [1.0], "discopop", {"beta": 0.1, "tau": 0.05}),
    (["sft"], [1.0], "sft", {}),
    (["sigmoid", "sft"], [1.0, 0.3], "rpo", {"beta": 0.1, "alpha": 0.3}),
    (["ipo", "hinge", "sft"], [0.5, 2.0, 0.3], "mixture", {"of": MIXED}),
]
# TRL's CPOTrainer: its settings, and our name and settings
CPO_TRAINER = [
    ({"loss_type": "sigmoid", "cpo_alpha": 0.3}, "cpo", {"beta": 0.1, "alpha": 0.3}),
    ({"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5}, "simpo", {"beta": 0.1, "target_margin": 0.5}),
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return {"output_dir": str(tmp_path_factory.mktemp("peer")), "use_cpu": True, "bf16": False, "report_to": "none"}


@pytest.fixture(scope="module")
def parts():
    """Arguments of every trainer; the weights are so large that policy and reference differ."""
    return {
        "model": random_model(initializer_range=0.2),
        "processing_class": byte_tokenizer(),
        "train_dataset": Dataset.from_list(PAIRS),
    }


@pytest.fixture(scope="module")
def dpo_trainer(settings, parts):
    from trl import DPOConfig, DPOTrainer

    reference = random_model(seed=1, initializer_range=0.2)
    return DPOTrainer(**parts, ref_model=reference, args=DPOConfig(**settings))


@pytest.mark.parametrize(("types", "weights", "name", "ours"), DPO_TRAINER)
def test_dpo_trainer(dpo_trainer, types, weights, name, ours):
    trainer = dpo_trainer
    trainer.loss_types, trainer.loss_weights = types, weights
    trainer.beta, trainer.label_smoothing = ours.get("beta", 0.1), ours.get("label_smoothing", 0.0)
    trainer.args.discopop_tau = ours.get("tau", 0.05)
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer._compute_loss(trainer.model, batch, return_outputs=False)

    labels_ST = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = batch["input_ids"], batch["attention_mask"], labels_ST
    policy, lengths = logps(trainer.model, *inputs)
    with torch.no_grad():
        reference, _ = logps(trainer.ref_model, *inputs)
    assert_same(trainer.model, theirs, name, ours, policy, lengths, reference)


def test_dpo_trainer_with_weights_of_tokens(dpo_trainer, monkeypatch):
    monkeypatch.setattr(dpo_trainer, "ld_alpha", 0.3)
    trainer, trainer.loss_types, trainer.loss_weights = dpo_trainer, ["sigmoid"], [1.0]
    trainer.beta, trainer.label_smoothing = 0.1, 0.0
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer._compute_loss(trainer.model, batch, return_outputs=False)

    inputs = batch["input_ids"], batch["attention_mask"], batch["completion_mask"][:, 1:].bool()
    chosen, rejected = inputs[2].sum(1).chunk(2)
    pairs = [
        token_weights.ld_dpo(*pair, [0], alpha=0.3) for pair in zip(chosen.tolist(), rejected.tolist(), strict=True)
    ]
    chosen_weights, rejected_weights = zip(*pairs, strict=True)
    weights_ST = inputs[2].float()
    for s, weights in enumerate([*chosen_weights, *rejected_weights]):
        weights_ST[s, inputs[2][s]] = torch.from_numpy(weights)
    assert {0.0, 1.0} < set(weights_ST.flatten().tolist())  # some tokens count less

    def sums(model):
        logp_STV = model(inputs[0], attention_mask=inputs[1]).logits[:, :-1].log_softmax(-1)
        return ChosenRejected(*(logp_STV.gather(-1, inputs[0][:, 1:, None])[..., 0] * weights_ST).sum(1).chunk(2))

    with torch.no_grad():
        reference = sums(trainer.ref_model)
    assert_same(trainer.model, theirs, "ld_dpo", {"beta": 0.1, "alpha": 0.3}, sums(trainer.model), None, reference)


@pytest.mark.parametrize(("their_settings", "name", "ours"), CPO_TRAINER)
def test_cpo_trainer(settings, parts, their_settings, name, ours):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    trainer = CPOTrainer(**parts, args=CPOConfig(**settings, **their_settings, beta=ours["beta"]))
    batch = next(iter(trainer.get_train_dataloader()))
    theirs, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
    assert_same(trainer.model, theirs, name, ours, *logps(trainer.model, *concatenated(trainer, batch)))


def test_orpo_trainer(settings, parts):
    """Everything except TRL's NLL, which includes the prompt."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer = ORPOTrainer(**parts, args=ORPOConfig(**settings, beta=0.1))
    batch = next(iter(trainer.get_train_dataloader()))
    policy, lengths = logps(trainer.model, *concatenated(trainer, batch))
    odds_B, *_ = trainer.odds_ratio_loss(policy.chosen / lengths.chosen, policy.rejected / lengths.rejected)
    nll_B = losses.sft(policy, lengths)
    assert_same(trainer.model, (nll_B - odds_B).mean(), "orpo", {"beta": 0.1}, policy, lengths)


def concatenated(trainer, batch):
    both = trainer.concatenated_inputs(batch, padding_value=0)
    return [both[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels")]


def logps(model, ids_ST, attention_ST, labels_ST):
    """Summed response log-probs and response lengths, computed without packing."""
    logp_STV = model(ids_ST, attention_mask=attention_ST).logits[:, :-1].log_softmax(-1)
    mask_ST = labels_ST[:, 1:] != -100
    logp_ST = logp_STV.gather(-1, ids_ST[:, 1:, None]).squeeze(-1)
    return ChosenRejected(*(logp_ST * mask_ST).sum(1).chunk(2)), ChosenRejected(*mask_ST.sum(1).chunk(2))


def assert_same(model, theirs, name, ours, policy, lengths, reference=None):
    data = {"policy": policy, "reference": reference, "lengths": lengths}
    loss = bind(losses, {"name": name} | ours)
    mine = loss(*(data[name] for name in inputs_of(loss))).mean()
    torch.testing.assert_close(mine, theirs)
    parameters = [p for p in model.parameters() if p.requires_grad]
    my_gradient, their_gradient = (
        torch.cat([g.flatten() for g in torch.autograd.grad(x, parameters, retain_graph=True)]) for x in (mine, theirs)
    )
    size = their_gradient.abs().max().item()
    assert size > 1e-3
    torch.testing.assert_close(my_gradient, their_gradient, rtol=0, atol=1e-5 * size)
