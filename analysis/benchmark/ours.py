"""This engine on the pairs of the benchmark."""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from analysis.benchmark.meter import Meter
from analysis.benchmark.work import BETA, LORA, LR, PASSES, Work
from sdpo import distributed
from sdpo.config import Config
from sdpo.model import hub, layers
from sdpo.model.checkpoints.checkpoint import Checkpoint
from sdpo.model.engine import Engine, open_engine
from sdpo.model.logprobs import Scorer, score
from sdpo.model.memory import scoring_budget
from sdpo.model.packing import micro_batches, pack, scoring_packs, tokens_of
from sdpo.store.artifacts import Artifact, Store
from sdpo.train import runner as runner_module
from sdpo.train.loop import TrainingLoop
from sdpo.train.probes import Probes
from sdpo.train.reference_logprobs import ReferenceLogprobs
from sdpo.train.step import take_step
from sdpo.train.step_key import StepSpec
from sdpo.types import ChosenRejected, Chunk, TokenPair
from sdpo.variants import loss as losses


def in_memory(work: Work, report: Callable[[dict], None]) -> None:
    """Passes over all pairs: reference log-probs, then the training loop, with each epoch as a pass of updates."""
    config, rows, meter = configure(work), work.rows(), Meter(work.device)
    engine = open_side(work, config)
    meter.mark()
    for _ in range(PASSES):
        logps_N2 = score(engine.module, rows, scoring_budget(config.launch))
        meter.lap("reference")
    reference = ReferenceLogprobs([], logps_N2, lambda: None, Probes((), 0), lambda members, rule_N2: rule_N2)
    nowhere = Artifact("", Path(work.folder), reused=True)
    spec = StepSpec(1, config, nowhere, [nowhere], _chunk(rows))
    loop = TrainingLoop(spec, engine)
    entries = []
    checkpoint = Checkpoint(Store(Path(work.folder) / "store"), "none", "benchmark", math.inf)
    for entry in loop.run(reference, logps_N2, checkpoint):
        entries.append(entry)
        if len(entries) % (len(rows) // work.pairs_per_update) == 0:
            meter.lap("updates")
    tokens = sum(map(tokens_of, rows))
    packs = [pack([rows[i] for i in members]) for members in scoring_packs(rows, scoring_budget(config.launch))]
    # The closing token of a pack does not count as padding.
    padding_share = 1 - tokens / sum(len(packed.tokens_T) - 1 for packed in packs)
    launch = {"tokens_per_pack": loop.budget, "compile": config.launch.compile, "attention": engine.scorer.backend}
    settings = launch | {"precision": config.precision, "masters": "float32"}
    found = {"first_loss": entries[0]["loss"], "padding_share": padding_share, "tokens": tokens, "settings": settings}
    report(found | meter.result())


def many_steps(work: Work, report: Callable[[dict], None]) -> None:
    """The cost of 8 steps beside that of 1 with the same pairs: passes, and all else from disk to disk."""
    work.save_model()
    for num_steps in (1, 8):
        meter = Meter(work.device)
        meter.time_calls("reference", runner_module, "score")
        meter.time_calls("updates", TrainingLoop, "run")
        with meter.phase("everything"):
            _take_steps(work, num_steps)
        spent = {name: [sum(seconds) for seconds in zip(*passes, strict=True)] for name, passes in meter.phases.items()}
        report({"pairs": len(work.rows()), str(num_steps): spent})


def configure(work: Work) -> Config:
    """The default configuration with the settings of the benchmark."""
    config = Config(loss={"name": "dpo", "beta": BETA}, tune={"name": "lora" if work.lora else "full"})
    config.reference = {"name": "previous", "placebo": "none"}
    config.precision, config.data.template = work.precision, "plain"
    config.optim.lr, config.optim.pairs_per_update, config.optim.epochs = LR, work.pairs_per_update, PASSES
    config.launch.device, config.launch.tokens_per_pack = work.device, work.packs[0]
    config.launch.compile = work.compiled[0]
    return config


def open_side(work: Work, config: Config) -> Engine:
    """The engine with a random model, made on the device in the precision of its passes. Adapters are peft's."""
    model = work.build(hub.DTYPES[work.precision])
    if work.lora:
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(**LORA), model)
    scorer = Scorer(model, config.launch.attention)
    device = distributed.device(work.device)
    layers.prepare(model, config.launch, device)
    return open_engine(scorer, config.optim, config.precision, config.deepspeed, device)


def take_update(engine: Engine, rows: list[TokenPair], tokens_per_pack: int) -> torch.Tensor:
    """One update of all pairs, without the training loop's statistics and checks; reference log-probs are 0.

    Returns the gradient's norm, still on the device.
    """
    plan = micro_batches(rows, tokens_per_pack)[0]
    for position, members in enumerate(plan):
        policy = engine.module(pack([rows[i] for i in members]).to(engine.scorer.head.weight.device))
        zeros_B = torch.zeros_like(policy.chosen)
        loss_B = losses.dpo(policy, ChosenRejected(zeros_B, zeros_B), beta=BETA)
        engine.backward(loss_B.sum() / len(rows), last=position == len(plan) - 1)
    return engine.update(LR)


def _take_steps(work: Work, num_steps: int) -> None:
    """All pairs as steps of this engine, each with its own reference pass, optimiser and saved model."""
    rows, config = work.rows(), configure(work)
    config.optim.epochs = 1
    with tempfile.TemporaryDirectory() as folder:
        runner = runner_module.Runner(config, Store(Path(folder)), hub.load_tokenizer(work.model))
        history = [Artifact(hub.fingerprint(work.model), work.model, reused=True)]
        for t, members in enumerate(np.array_split(np.arange(len(rows)), num_steps), start=1):
            chunk = _chunk([rows[i] for i in members])
            history.append(take_step(StepSpec(t, config, history[-1], list(history), chunk), runner).model)


def _chunk(rows: list[TokenPair]) -> Chunk:
    return Chunk(rows, np.full((len(rows), 2), np.nan, np.float32))
