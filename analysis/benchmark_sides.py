"""One side of the benchmark in a process of its own: TRL's DPOTrainer, or this engine's step, over the same pairs.

    python -m analysis.benchmark_sides SIDE WORK.json RESULT.json
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from analysis.benchmark_work import MAX_TOKENS, Work, text
from sdpo import losses, models, workbench
from sdpo.config import Config
from sdpo.fit import Fit
from sdpo.inputs import as_chunk
from sdpo.data import Pair
from sdpo.logprobs import Scorer
from sdpo.packing import micro_batches, pack, tokens_of
from sdpo.step import take_step
from sdpo.store import Artifact, Store
from sdpo.tokens import TokenPair
from sdpo.workbench import Workbench

BETA, LR = 0.1, 5e-7


class Meter:
    """CPU and wall seconds of named phases, and the peak of memory above what it was when the meter was made."""

    def __init__(self, device: str):
        self.cuda, self.phases = device == "cuda", {}
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak starts again from here
        self.start = self._peak()

    def _peak(self) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        cpu, wall = time.process_time(), time.monotonic()
        yield
        if self.cuda:
            torch.cuda.synchronize()
        spent = self.phases.setdefault(name, {"cpu": 0.0, "wall": 0.0})
        spent["cpu"] += time.process_time() - cpu
        spent["wall"] += time.monotonic() - wall

    def around(self, name: str, function: Callable) -> Callable:
        """The function, with its calls counted as a phase."""

        def measured(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return measured

    def result(self) -> dict:
        return {"phases": self.phases, "peak_bytes": self._peak() - self.start}


def trl_default(work: Work, meter: Meter) -> dict:
    """DPOTrainer as it comes: reference model in every step, activation checkpointing."""
    return _train_trl(work, meter, {})


def trl_tuned(work: Work, meter: Meter) -> dict:
    """DPOTrainer at its best: reference log-probs computed once, no checkpointing."""
    return _train_trl(work, meter, {"precompute_ref_log_probs": True, "gradient_checkpointing": False})


def _train_trl(work: Work, meter: Meter, options: dict) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(work, folder, options, meter)
        with meter.phase("updates"):
            trainer.train()
    losses_seen = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"padding_share": _padding_share(work, trainer), "first_loss": losses_seen[0]}


def _trainer(work: Work, folder: str, options: dict, meter: Meter):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

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
    names = ("prompt", "chosen", "rejected")
    data = Dataset.from_list([{name: text(getattr(row, name)).strip() for name in names} for row in rows])
