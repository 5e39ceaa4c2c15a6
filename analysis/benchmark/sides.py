"""One side of the benchmark in a process of its own: TRL's DPOTrainer, or this engine's steps, over the same pairs.

python -m analysis.benchmark.sides SIDE WORK.json RESULT.json
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from analysis.benchmark.meter import Meter
from analysis.benchmark.work import MAX_TOKENS, Work, text
from sdpo.config import Config
from sdpo.model import hub
from sdpo.model.logprobs import Scorer
from sdpo.model.packing import in_order, pack, tokens_of
from sdpo.store import Artifact, Store
from sdpo.train import runner
from sdpo.train.loop import Chunk, Fit
from sdpo.train.step import take_step
from sdpo.variants import loss as losses
from sdpo.variants.loss import Both

BETA, LR = 0.1, 5e-7
TOKENS_PER_PACK = {"cpu": 1536, "cuda": 8192}
TUNED = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}


def trl_default(work: Work, meter: Meter) -> dict:
    """DPOTrainer as it comes: a reference forward pass in every step, activation checkpointing."""
    return _train_trl(work, meter, {})


def trl_tuned(work: Work, meter: Meter) -> dict:
    """DPOTrainer at its best: reference log-probs computed once, no checkpointing."""
    return _train_trl(work, meter, TUNED)


def _train_trl(work: Work, meter: Meter, options: dict) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(work, folder, options, meter)
        with meter.phase("updates"):
            trainer.train()
    lengths = np.array([[len(ids) for ids in row[1:]] for row in work.rows()])
    sequences = (lengths[:, :1] + lengths[:, 1:]).reshape(-1, 2 * work.pairs_per_microbatch)
    return {
        "first_loss": next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry),
        "padding_share": 1 - float(sequences.mean() / sequences.max(axis=1).mean()),
    }


def _trainer(work: Work, folder: str, options: dict, meter: Meter | None = None):
    """TRL's trainer on the pairs as text; its reference pass, where it makes one, is a phase of its own."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    if meter:
        DPOTrainer._precompute_ref_logps = meter.around("reference", DPOTrainer._precompute_ref_logps)
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
    for row, theirs in zip(rows, trainer.train_dataset, strict=True):
        assert [theirs[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")] == [ids.tolist() for ids in row[1:]]
    return trainer


def engine(work: Work, meter: Meter) -> dict:
    """This engine's own step, reference pass included."""
    return _steps(work, meter, 1)


def engine_in_8_steps(work: Work, meter: Meter) -> dict:
    """The same pairs as 8 steps, each with its own reference, optimiser and saved model."""
    return _steps(work, meter, 8)


def _steps(work: Work, meter: Meter, num_steps: int) -> dict:
    runner.score = meter.around("reference", runner.score)
    Fit.run = meter.around("updates", Fit.run)
    rows, config, steps = work.rows(), _config(work), []
    with tempfile.TemporaryDirectory() as folder:
        bench = runner.Workbench(config, Store(Path(folder)), hub.load_tokenizer(work.model))
        history = [Artifact(hub.fingerprint(work.model), work.model, reused=True)]
        with meter.phase("everything"):
            for t, members in enumerate(np.array_split(np.arange(len(rows)), num_steps), start=1):
                chunk = Chunk([rows[i] for i in members], np.full((len(members), 2), np.nan, np.float32))
                steps.append(take_step(bench, config, t, history[-1], history, chunk))
                history.append(steps[-1].model)
    tokens = sum(map(tokens_of, rows))
    packs = [pack([rows[i] for i in members]) for members in in_order(rows, config.launch.tokens_per_pack)]
    return {
        "first_loss": steps[0].entries[0]["loss"],
        # Of positions that make up for unequal lengths; the one token that closes a pack is none of them.
        "padding_share": 1 - tokens / sum(len(packed.tokens_T) - 1 for packed in packs),
        "tokens": tokens,
    }


def _config(work: Work) -> Config:
    """The defaults, at TRL's settings. Packs hold at most as many pairs, on average, as TRL's micro-batches; on the
    CPU fewer, so that activations stay in the cache."""
    config = Config(loss={"name": "dpo", "beta": BETA}, tune={"name": "full"}, precision=work.precision)
    config.reference = {"name": "previous", "placebo": "none"}
    config.optim.lr, config.optim.pairs_per_update = LR, work.pairs_per_update
    config.launch.device = work.device
    rows = work.rows()
    mean_tokens = sum(map(tokens_of, rows)) / len(rows)
    config.launch.tokens_per_pack = min(TOKENS_PER_PACK[work.device], round(work.pairs_per_microbatch * mean_tokens))
    return config


def agreement(work: Work, meter: Meter) -> dict:
    """How far loss and gradient of the first update's batch are from TRL's, relative.

    Each side has its own reference pass, moved by the same random amounts so that margins are not 0.
    """
    rows = work.rows()[: work.pairs_per_update]
    shift = Both(*torch.randn(2, len(rows), generator=torch.Generator().manual_seed(0)))
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(work._replace(pairs_per_microbatch=len(rows)), folder, TUNED)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    for name, moved in zip(("ref_chosen_logps", "ref_rejected_logps"), shift, strict=True):
        batch[name] += moved
    theirs = trainer.model.train()
    their_loss = trainer.compute_loss(theirs, batch)
    their_loss.backward()
    ours = hub.load(work.model)
    policy = Scorer(ours)(pack(rows))
    reference = Both(*(logps.detach() + moved for logps, moved in zip(policy, shift, strict=True)))
    our_loss = losses.dpo(policy, reference, beta=BETA).mean()
    our_loss.backward()
    gradients = [torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (ours, theirs)]
    return {
        "loss": our_loss.item(),
        "loss_difference": abs(our_loss.item() / their_loss.item() - 1),
        "gradient_difference": float((gradients[0] - gradients[1]).norm() / gradients[1].norm()),
    }


SIDES = {side.__name__: side for side in (trl_default, trl_tuned, engine, engine_in_8_steps, agreement)}


def main(side: str, work_file: str, result_file: str) -> None:
    torch.set_num_threads(1)
    work = Work(**json.loads(Path(work_file).read_text()))
    meter = Meter(work.device)
    result = SIDES[side](work, meter)
    Path(result_file).write_text(json.dumps(result | meter.result()))


if __name__ == "__main__":
    main(*sys.argv[1:])
