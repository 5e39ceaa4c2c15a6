"""TRL's DPOTrainer on the pairs of the benchmark.

What TRL 1.16 always does: it computes log-probs in tiles, at response positions only (`add_fused_lm_head`), and its
optimiser is PyTorch's fused AdamW. What it offers beyond its defaults is in `tuned`. Its `padding_free` does nothing
in this version.
"""

import gc
import tempfile
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, TrainerCallback
from transformers.training_args import OptimizerNames
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

from analysis.benchmark.meter import Meter
from analysis.benchmark.work import BETA, LORA, LR, MAX_TOKENS, PASSES, Work, text, tokenizer
from sdpo.model.memory import ran_out
from sdpo.types import TokenPair

Options = dict[str, Any]


def with_defaults(work: Work, report: Callable[[dict], None]) -> None:
    """TRL's defaults: fp32 weights under bf16 autocast (fp32 on a CPU), a reference pass in every update, gradient
    checkpointing, 8 pairs in a micro-batch."""
    size = min(8, work.pairs_per_update)
    report(_measure(work, {"per_device_train_batch_size": size}, torch.float32))


def tuned(work: Work, report: Callable[[dict], None]) -> None:
    """TRL's fastest settings: of all micro-batches that fit, the fastest in steady state; without gradient
    checkpointing unless nothing fits without it. The first pass is that of the first micro-batch that fits, because
    later ones find a process that has begun."""
    measured: dict[str, dict] = {}
    for checkpointing in (False, True):
        for size in work.trl_batches:
            options = fastest(work) | {"per_device_train_batch_size": size, "gradient_checkpointing": checkpointing}
            if (found := _measure_if_it_fits(work, options)) is None:
                break
            name = f"{size} pairs" + (", checkpointing" if checkpointing else "")
            measured[name] = found
            tried = {name: run["phases"] for name, run in measured.items()}
            best = min(measured.values(), key=lambda run: sum(passes[-1].wall for passes in run["phases"].values()))
            begun = {phase: [passes[0]] for phase, passes in next(iter(tried.values())).items()}
            phases = {phase: begun[phase] + passes[1:] for phase, passes in best["phases"].items()}
            report(best | {"phases": phases, "tried": tried})
        if measured:
            return
    raise torch.OutOfMemoryError(f"no micro-batch of {work.trl_batches} pairs fits, even with checkpointing")


def fastest(work: Work) -> Options:
    """TRL's settings for speed, but for those that depend on memory.

    The weights are bf16 and have no fp32 masters, so that nothing is cast; adapters are fp32, under autocast. If all
    pairs are one update, they come in the order of their lengths; else this would change what an update reads.
    """
    is_one_update = work.pairs_per_update == len(work.rows())
    return {
        "precompute_ref_log_probs": True,
        "bf16": work.precision == "bf16" and work.lora,
        "train_sampling_strategy": "sequential" if is_one_update else "random",
    }


def _measure_if_it_fits(work: Work, options: Options) -> dict | None:
    try:
        return _measure(work, options, torch.bfloat16 if work.precision == "bf16" else torch.float32)
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
    gc.collect()  # here, where the error no longer holds the tensors
    torch.cuda.empty_cache()
    return None


def _measure(work: Work, options: Options, dtype: torch.dtype) -> dict:
    """Passes over all pairs, as epochs of one training."""
    meter = Meter(work.device)
    model = work.build(dtype)
    with tempfile.TemporaryDirectory() as folder:
        epochs = {"output_dir": folder, "num_train_epochs": PASSES}
        trainer = make_trainer(work, model, options | epochs, meter)
        if trainer.precompute_ref_logps:
            trainer.precompute_again(PASSES - 1)
        padding = _Padding(trainer.data_collator)
        trainer.data_collator = padding
        trainer.add_callback(_Laps(meter))
        meter.mark()
        trainer.train()
    settings = options | {
        "weights": str(dtype).removeprefix("torch."),
        "bf16": trainer.args.bf16,
        "gradient_checkpointing": trainer.args.gradient_checkpointing,
        "optim": OptimizerNames(trainer.args.optim).value,
        "attention": model.config._attn_implementation,
    }
    first_loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return {"first_loss": first_loss, "padding_share": padding.share, "settings": settings} | meter.result()


def make_trainer(work: Work, model: PreTrainedModel, options: Options, meter: Meter) -> "TimedTrainer":
    """A DPOTrainer on the pairs as text. Precomputing reference log-probs counts as a phase of the meter.

    If it does so, the data set is sorted by length, which saves padding.
    """
    precomputes = options.get("precompute_ref_log_probs", False)
    rows = longest_first(work.rows()) if precomputes else work.rows()
    given: Options = {"bf16": work.precision == "bf16"} | options
    args = DPOConfig(
        gradient_accumulation_steps=work.pairs_per_update // options["per_device_train_batch_size"],
        learning_rate=LR,
        beta=BETA,
        max_length=MAX_TOKENS,
        use_cpu=work.device == "cpu",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **given,
    )
    trainer = TimedTrainer(
        meter,
        model=model,
        ref_model=None if precomputes or work.lora else work.build(model.dtype),
        args=args,
        train_dataset=Dataset.from_list([_as_text(row) for row in rows]),
        processing_class=tokenizer(),
        peft_config=LoraConfig(**LORA) if work.lora else None,
    )
    for row, theirs in zip(rows, trainer.rows, strict=True):
        assert [theirs[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")] == [ids.tolist() for ids in row.ids]
    return trainer


def longest_first(rows: list[TokenPair]) -> list[TokenPair]:
    """The pairs in the order of their longer sequences."""
    return sorted(rows, key=lambda row: row.longest, reverse=True)


class TimedTrainer(DPOTrainer):
    """A DPOTrainer whose passes for reference log-probs are timed.

    TRL names the file that keeps them by a hash of all weights, which it takes on the CPU. A random name takes no time.
    """

    def __init__(self, meter: Meter, **arguments: Any):
        self.meter = meter
        dpo_trainer.hash_module = lambda module: uuid4().hex
        super().__init__(**arguments)

    def _precompute_ref_logps(self, *arguments: Any) -> Dataset:
        self.meter.mark()
        scored = super()._precompute_ref_logps(*arguments)
        self.meter.lap("reference")
        return scored

    @property
    def rows(self) -> Dataset:
        """The tokenised data set."""
        assert isinstance(self.train_dataset, Dataset)
        return self.train_dataset

    @property
    def policy(self) -> PreTrainedModel:
        """The model that is trained."""
        assert isinstance(self.model, PreTrainedModel)
        return self.model

    def precompute_again(self, times: int) -> None:
        """Compute the same reference log-probs this many times more."""
        rows = self.rows.remove_columns(["ref_chosen_logps", "ref_rejected_logps"])
        for _ in range(times):
            self._precompute_model_hash = uuid4().hex
            self._precompute_ref_logps(rows, "train", self.args.per_device_train_batch_size)


class _Laps(TrainerCallback):
    """Every epoch is a pass of updates."""

    def __init__(self, meter: Meter):
        self.meter = meter

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.meter.lap("updates")


class _Padding:
    """A collator that measures the share of positions that only fill up unequal lengths."""

    def __init__(self, collate: Callable):
        self.collate, self.real, self.all = collate, 0, 0

    def __call__(self, examples: list[dict]) -> dict:
        batch = self.collate(examples)
        self.real += int(batch["attention_mask"].sum())
        self.all += batch["attention_mask"].numel()
        return batch

    @property
    def share(self) -> float:
        return 1 - self.real / self.all


def _as_text(row: TokenPair) -> dict[str, str]:
    return {"prompt": text(row.prompt).strip(), "chosen": text(row.chosen), "rejected": text(row.rejected)}
