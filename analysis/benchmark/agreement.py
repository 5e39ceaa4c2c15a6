"""Whether this engine and TRL compute the same loss and gradient."""

import tempfile
from collections.abc import Callable

import torch

from analysis.benchmark.meter import Meter
from analysis.benchmark.trl import fastest, longest_first, make_trainer
from analysis.benchmark.work import BETA, Work
from sdpo.model.logprobs import Scorer
from sdpo.model.packing import pack
from sdpo.types import ChosenRejected
from sdpo.variants import loss as losses


def first_update(work: Work, report: Callable[[dict], None]) -> None:
    """The relative differences between our loss and gradient and TRL's, on one micro-batch in fp32.

    Each side computes its own reference log-probs. The same random numbers are added to both; margins are not 0.
    """
    size = work.trl_batches[0]
    work = work._replace(precision="fp32", lora=False)
    with tempfile.TemporaryDirectory() as folder:
        options = fastest(work) | {"per_device_train_batch_size": size, "gradient_checkpointing": False}
        trainer = make_trainer(work, work.build(), options | {"output_dir": folder}, Meter(work.device))
    shift_2B = torch.randn(2, size, generator=torch.Generator().manual_seed(0)).to(work.device)
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.rows[i] for i in range(size)]))
    for name, moved_B in zip(("ref_chosen_logps", "ref_rejected_logps"), shift_2B, strict=True):
        batch[name] += moved_B
    theirs, ours = trainer.policy.train(), work.build()
    their_loss = trainer.compute_loss(theirs, batch)
    their_loss.backward()
    policy = Scorer(ours, "sdpa")(pack(longest_first(work.rows())[:size]).to(work.device))
    reference = ChosenRejected(*(logps_B.detach() + moved_B for logps_B, moved_B in zip(policy, shift_2B, strict=True)))
    our_loss = losses.dpo(policy, reference, beta=BETA).mean()
    our_loss.backward()
    gradients = [
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) for model in (ours, theirs)
    ]
    report(
        {
            "loss": our_loss.item(),
            "loss_difference": abs(our_loss.item() / their_loss.item() - 1),
            "gradient_difference": float((gradients[0] - gradients[1]).norm() / gradients[1].norm()),
        }
    )
