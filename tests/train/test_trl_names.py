"""What TRL logs of an update stands in metrics.jsonl under its names, with its values, and in W&B; so does the rest."""

import pandas as pd
import pytest
import torch
from conftest import needs_bf16, read_lines
from datasets import Dataset
from test_wandb_mirror import mirrored
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo import export
from sdpo.train import throughput
from sdpo.train.loop import kl_proxy
from sdpo.types import ChosenRejected

BOTH = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")


@pytest.mark.filterwarnings("ignore")  # TRL's own warnings
def test_values_equal_those_of_trl_on_the_same_batch(run, tmp_path):
    """Each step is one update: the second one's policy is M_1 and its reference is S, so all values differ from 0."""
    from trl import DPOConfig, DPOTrainer

    folder = run("split=by_source", "reference=initial", "optim.pairs_per_update=100", "loss.beta=0.3", "record=wandb")
    data = Dataset.from_parquet(str(export.export_pairs(folder, 2, tmp_path / "pairs.parquet")))
    start = folder / "steps" / "1"
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "beta": 0.3, "output_dir": str(tmp_path / "trl")}
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(start),
        args=DPOConfig(per_device_train_batch_size=len(data), **settings),
        processing_class=AutoTokenizer.from_pretrained(start),
        train_dataset=data,
    )
    trainer.precompute_ref_logps = True  # read the columns
    trainer._compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())), return_outputs=False)
    (theirs,) = ({name: given[name][0] for name in BOTH} for given in trainer._metrics.values() if given)
    (ours,) = (entry for entry in read_lines(folder, "train") if (entry["t"], entry["update"]) == (2, 1))
    assert {name: ours[name] for name in BOTH} == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert 0 < theirs["rewards/accuracies"] < 1 and abs(theirs["rewards/chosen"]) > 1e-3
    means = [sum(data[f"ref_{side}_logps"]) / len(data) for side in ("chosen", "rejected")]
    assert [ours["logps/ref_chosen"], ours["logps/ref_rejected"]] == pytest.approx(means, rel=1e-5)
    rows = [row for row in mirrored(folder)[1] if "train/loss" in row]
    written = [{name: entry[name] for name in BOTH} for entry in read_lines(folder, "train")]
    assert [{name: row[f"train/{name}"] for name in BOTH} for row in rows] == written


def test_a_tie_counts_as_trl_counts_it_and_without_a_reference_there_are_no_rewards(run):
    first = read_lines(run("split=all_at_once", "evaluate=[]"), "train")[0]
    assert (first["margin"], first["reward_accuracy"], first["rewards/accuracies"]) == (0, 0.5, 0)
    alone = read_lines(run("split=all_at_once", "evaluate=[]", "loss=simpo", "reference=none", name="alone"), "train")[
        0
    ]
    assert {alone[name] for name in ("rewards/chosen", "rewards/accuracies", "logps/ref_chosen")} == {None}
    assert alone["logps/chosen"] == alone["chosen_logp"]


def test_the_kl_proxy_is_half_the_squared_log_ratio_per_token():
    """Log-ratios of 1 nat on 2 tokens and of -1 nat on 4 tokens: (0.5 ** 2 / 2 + 0.25 ** 2 / 2) / 2."""
    policy, reference, lengths = (
        ChosenRejected(torch.tensor([chosen]), torch.tensor([rejected]))
        for chosen, rejected in ((-4.0, -7.0), (-5.0, -6.0), (2.0, 4.0))
    )
    assert kl_proxy(policy, reference, lengths).tolist() == [0.078125]


def test_an_update_s_kl_proxy_is_the_mean_over_its_pairs_and_null_without_a_reference(run):
    """At step 2's only update the policy is M_1, whose log-probs another run reads as its reference."""
    one_update = ["split=by_source", "optim.pairs_per_update=100", "evaluate=[]"]
    moving, fixed = (run(*one_update, f"reference={rule}", name=rule) for rule in ("previous", "initial"))
    policy, reference = (
        pd.read_parquet(folder / "steps" / "2" / "reference.parquet").set_index("id") for folder in (moving, fixed)
    )
    tokens = pd.read_parquet(fixed / "pairs.parquet").set_index("id").loc[policy.index]
    sides = ("chosen", "rejected")
    squares = [((policy[side] - reference[side]) / tokens[f"{side}_tokens"]) ** 2 / 2 for side in sides]
    found = [entry["kl_proxy"] for entry in read_lines(fixed, "train")]
    assert found[0] == 0 < found[1] == pytest.approx(pd.concat(squares).mean(), rel=1e-4)
    alone = run(*one_update, "loss=simpo", "reference=none", name="alone")
    assert {entry["kl_proxy"] for entry in read_lines(alone, "train")} == {None}


@needs_bf16  # utilisation is told of bf16 only
def test_every_update_s_line_has_its_speed_and_the_memory_in_use(run, monkeypatch):
    """On a device with a peak of 1 GFLOP/s; each weight that is multiplied costs 6 operations per token.

    These are the head's 300 x 32, and of each of two layers 2 x 32 x 32 + 2 x 32 x 16 + 3 x 32 x 48 and two norms of
    32; and the last norm: 25120.
    """
    monkeypatch.setattr(throughput, "peak", lambda device: 1e9)
    lines = read_lines(run("split=all_at_once", "evaluate=[]", "precision=bf16", "launch.attention=plain"), "train")
    for line in lines:
        assert line["utilisation"] == pytest.approx(6 * 25120 * line["tokens"] / line["seconds"] / 1e9)
        assert line["tokens_per_second"] == line["tokens"] / line["seconds"]
        assert 0.05 < line["memory_gb"] < 100
    used = [line["memory_gb"] for line in lines]
    assert used == sorted(used)
