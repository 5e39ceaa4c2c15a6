"""One side of the benchmark in its own process: TRL's DPOTrainer or this engine, on the same pairs.

python -m analysis.benchmark.sides SIDE WORK.json RESULT.json
"""

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from analysis.benchmark.meter import Meter
from analysis.benchmark.trl import BETA, LR, TUNED, make_trainer, train_trl
from analysis.benchmark.work import Work
from sdpo.config import Config
from sdpo.model import hub
from sdpo.model.logprobs import Scorer
from sdpo.model.packing import pack, scoring_packs, tokens_of
from sdpo.store.artifacts import Artifact, Store
from sdpo.train import runner as runner_module
from sdpo.train.loop import TrainingLoop
from sdpo.train.step import take_step
from sdpo.train.step_key import StepSpec
from sdpo.types import ChosenRejected, Chunk
from sdpo.variants import loss as losses

TOKENS_PER_PACK = {"cpu": 1536, "cuda": 8192}


def engine(work: Work, meter: Meter, num_steps: int) -> dict:
    """All pairs as steps of this engine, each with its own reference pass, optimiser and saved model."""
    meter.time_calls("reference", runner_module, "score")
    meter.time_calls("updates", TrainingLoop, "run")
    rows, config, steps = work.rows(), _config(work), []
    with tempfile.TemporaryDirectory() as folder:
        runner = runner_module.Runner(config, Store(Path(folder)), hub.load_tokenizer(work.model))
        history = [Artifact(hub.fingerprint(work.model), work.model, reused=True)]
        with meter.phase("everything"):
            for t, members in enumerate(np.array_split(np.arange(len(rows)), num_steps), start=1):
                chunk = Chunk([rows[i] for i in members], np.full((len(members), 2), np.nan, np.float32))
                steps.append(take_step(StepSpec(t, config, history[-1], list(history), chunk), runner))
                history.append(steps[-1].model)
    tokens = sum(map(tokens_of, rows))
    packs = [pack([rows[i] for i in members]) for members in scoring_packs(rows, config.launch.tokens_per_pack)]
    return {
        "first_loss": steps[0].entries[0]["loss"],
        # The share of positions that only fill up unequal lengths. The closing token of a pack does not count.
        "padding_share": 1 - tokens / sum(len(packed.tokens_T) - 1 for packed in packs),
        "tokens": tokens,
    }


def _config(work: Work) -> Config:
    """The default configuration with TRL's settings. On average a pack holds at most as many pairs as a micro-batch of
    TRL; on a CPU fewer, so that activations stay in the cache."""
    config = Config(loss={"name": "dpo", "beta": BETA}, tune={"name": "full"}, precision=work.precision)
    config.reference = {"name": "previous", "placebo": "none"}
    config.optim.lr, config.optim.pairs_per_update = LR, work.pairs_per_update
    config.data.template, config.launch.device = "plain", work.device
    rows = work.rows()
    mean_tokens = sum(map(tokens_of, rows)) / len(rows)
    config.launch.tokens_per_pack = min(TOKENS_PER_PACK[work.device], round(work.pairs_per_microbatch * mean_tokens))
    return config


def agreement(work: Work, meter: Meter) -> dict:
    """The relative differences between our loss and gradient and TRL's, on the batch of the first update.

    Each side computes its own reference log-probs. The same random numbers are added to both; margins are not 0.
    """
    rows = work.rows()[: work.pairs_per_update]
    shift = ChosenRejected(*torch.randn(2, len(rows), generator=torch.Generator().manual_seed(0)))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(work._replace(pairs_per_microbatch=len(rows)), folder, TUNED)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    for name, moved in zip(("ref_chosen_logps", "ref_rejected_logps"), shift, strict=True):
        batch[name] += moved
    theirs = trainer.model.train()
    their_loss = trainer.compute_loss(theirs, batch)
    their_loss.backward()
    ours = hub.load(work.model)
    policy = Scorer(ours)(pack(rows))
    reference = ChosenRejected(*(logps.detach() + moved for logps, moved in zip(policy, shift, strict=True)))
    our_loss = losses.dpo(policy, reference, beta=BETA).mean()
    our_loss.backward()
    gradients = [
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) for model in (ours, theirs)
    ]
    return {
        "loss": our_loss.item(),
        "loss_difference": abs(our_loss.item() / their_loss.item() - 1),
        "gradient_difference": float((gradients[0] - gradients[1]).norm() / gradients[1].norm()),
    }


SIDES: dict[str, Callable[[Work, Meter], dict]] = {
    "trl_default": partial(train_trl, options={}),  # a reference pass in every update, activation checkpointing
    "trl_tuned": partial(train_trl, options=TUNED),
    "engine": partial(engine, num_steps=1),
    "engine_in_8_steps": partial(engine, num_steps=8),
    "agreement": agreement,
}


def main(side: str, work_file: str, result_file: str) -> None:
    """Measure one side and write the result as JSON."""
    torch.set_num_threads(1)
    work = Work(**json.loads(Path(work_file).read_text()))
    meter = Meter(work.device)
    result = SIDES[side](work, meter)
    Path(result_file).write_text(json.dumps(result | meter.result()))


if __name__ == "__main__":
    main(*sys.argv[1:])
