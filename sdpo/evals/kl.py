"""KL(M_t, S) on answers that the model gives to prompts. The laboratory's KL is in sdpo/lab/measures.py."""

from typing import cast

import torch
from transformers import PreTrainedModel

from sdpo import distributed
from sdpo.data.prompts import Prompt
from sdpo.evals.decoding import Decoding
from sdpo.evals.generation import LIBRARIES, Answer, answers, load_alone
from sdpo.model import sampling
from sdpo.model.attention.interface import own_attention
from sdpo.store.artifacts import Artifact, key_of
from sdpo.train.runner import Runner


def kl_to_initial(
    model: Artifact, initial_model: Artifact, prompts: list[Prompt], decoding: Decoding, runner: Runner
) -> list[float]:
    """KL(M_t, S) in nats per prompt, on answers that the model gives at temperature 1.

    It is the exact next-token KL summed over the positions of an answer, EOS counted. If a prompt has several turns,
    its answers are added up.
    """
    sampled = answers(model, prompts, decoding._replace(temperature=1.0, top_p=1.0), runner)
    determinants = {
        "suite": "divergence",
        "weights": model.key,
        "initial": initial_model.key,
        "answers": key_of("answers", {"answers": sampled}),
        **runner.numerics.of_own_forward(),
        **LIBRARIES,
    }

    def compute() -> list[float]:
        policy, initial = (load_alone(one, runner) for one in (model, initial_model))
        own = range(distributed.rank(), len(sampled), distributed.world_size())
        with own_attention(policy), own_attention(initial):
            share = {i: sum(_kl(policy, initial, answer) for answer in sampled[i]) for i in own}
        return distributed.gather_numbered(share)

    return cast(list[float], runner.store.make_json("evaluation", determinants, compute))


def _kl(policy: PreTrainedModel, initial: PreTrainedModel, answer: Answer) -> float:
    ids = (answer["prompt_ids"], answer["ids"])
    prompt_1T, response_1T = (torch.tensor([part], device=policy.device) for part in ids)
    whole = sampling.Answers(prompt_1T, response_1T, torch.ones_like(response_1T, dtype=torch.bool), [answer["text"]])
    return sampling.kl(policy, initial, whole).item()
