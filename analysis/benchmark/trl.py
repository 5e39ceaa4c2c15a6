"""TRL's DPOTrainer on the pairs of the benchmark."""

import tempfile
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from analysis.benchmark.meter import Meter
from analysis.benchmark.work import MAX_TOKENS, Work, text
from sdpo.model import hub

BETA, LR = 0.1, 5e-7
# TRL's fastest settings: reference log-probs computed once, no activation checkpointing.
TUNED = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}


def train_trl(work: Work, meter: Meter, options: dict) -> dict:
    """All pairs as one epoch of DPOTrainer with its defaults, but for these options."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(work, folder, options, meter)
        with meter.phase("updates"):
            trainer.train()
    lengths = np.array([[len(ids) for ids in row.ids] for row in work.rows()])
    sequences = (lengths[:, :1] + lengths[:, 1:]).reshape(-1, 2 * work.pairs_per_microbatch)
    return {
        "first_loss": next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry),
        "padding_share": 1 - float(sequences.mean() / sequences.max(axis=1).mean()),
    }


def make_trainer(work: Work, folder: str, options: dict, meter: Meter | None = None) -> Any:
    """A DPOTrainer on the pairs as text. With a meter, precomputing reference log-probs counts as a phase."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    if meter:
        meter.time_calls("reference", DPOTrainer, "_precompute_ref_logps")
    args = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=work.pairs_per_microbatch,
        gradient_accumulation_steps=work.pairs_per_update // work.pairs_per_microbatch,
        num_train_epochs=1,
        learning_rate=LR,
        beta=BETA,
        max_length=MAX_TOKENS,
        bf16=work.precision == "bf16",
        use_cpu=work.device == "cpu",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    rows = work.rows()
    texts = [{"prompt": text(r.prompt).strip(), "chosen": text(r.chosen), "rejected": text(r.rejected)} for r in rows]
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(texts),
        processing_class=hub.load_tokenizer(work.model),
    )
    dataset = trainer.train_dataset
    assert isinstance(dataset, Dataset)
    for row, theirs in zip(rows, dataset, strict=True):
        assert [theirs[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")] == [ids.tolist() for ids in row.ids]
    return trainer
