"""What TRL logs of an update stands in metrics.jsonl under its names, with its values, and in W&B."""

import pytest
from conftest import read_lines
from datasets import Dataset
from test_wandb_mirror import mirrored
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo import export

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
