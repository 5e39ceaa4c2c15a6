"""Answers of a model to prompts; those of the laboratory are also scored, and compared with another model.

The laboratory's prompts have the same length, so a batch of them needs no padding.
Shapes: N prompts, S answers, P prompt tokens, R response tokens (padded with the stop token), V vocabulary; B prompts
and T tokens if they are padded.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

MAX_TOKENS = 16  # of an answer: six letters and the ten fillers that bring the gold reward to zero
BATCH = 256  # answers that are scored together: a larger batch leaves the processor cache and takes twice the time


class Answers(NamedTuple):
    """Token ids of prompts and answers; `mask_SR` is true up to and including the first stop token."""

    prompt_SP: Tensor
    response_SR: Tensor
    mask_SR: Tensor
    text: list[str]


def named_stops(folder: Path) -> list[int]:
    """The ids at which a model's generation_config.json ends an answer; none if the folder has no such file."""
    path = folder / "generation_config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    return named if isinstance(named, list) else [] if named is None else [named]


def continuations(network: PreTrainedModel, prompts: list[list[int]], stops: list[int]) -> list[list[int]]:
    """What the model writes after each prompt, up to and including the first stop token, as its generation_config says.

    The prompts are padded on the left to one length.
    """
    width = max(map(len, prompts))
    padded = [[stops[0]] * (width - len(ids)) + ids for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    tokens_BT, mask_BT = (torch.tensor(rows, device=network.device) for rows in (padded, mask))
    whole_BT = cast(GenerationMixin, network).generate(tokens_BT, attention_mask=mask_BT)
    responses = whole_BT[:, width:].tolist()
    ends = [next((i + 1 for i, id in enumerate(ids) if id in stops), len(ids)) for ids in responses]
    return [ids[:end] for ids, end in zip(responses, ends, strict=True)]


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    num_samples: int,
    seed: int | None,
) -> Answers:
    """`num_samples` answers per prompt, next to each other, at temperature 1 and without top-k or top-p.

    If `seed` is None, the answer is the greedy one. The same seed gives every model the same random numbers.
    """
    assert isinstance(model, GenerationMixin)
    prompt_NP = tokenizer(prompts, return_tensors="pt")["input_ids"].to(model.device)
    method: dict[str, Any] = {"do_sample": False} if seed is None else {"do_sample": True, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng():
        torch.manual_seed(seed or 0)
        whole = model.generate(
            prompt_NP,
            attention_mask=torch.ones_like(prompt_NP),
            num_return_sequences=num_samples,
            max_new_tokens=MAX_TOKENS,
            pad_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **method,
        )
    return _answers(whole[:, : prompt_NP.shape[1]], whole[:, prompt_NP.shape[1] :], tokenizer)


def encode(tokenizer: PreTrainedTokenizerBase, prompts: list[str], texts: list[str], device: torch.device) -> Answers:
    """Given answers, one per prompt, as token ids."""
    stop = tokenizer.eos_token
    responses = tokenizer([text + stop for text in texts], padding=True, padding_side="right", return_tensors="pt")
    prompt_SP = tokenizer(prompts, return_tensors="pt")["input_ids"].to(device)
    return _answers(prompt_SP, responses["input_ids"].to(device), tokenizer)


def _answers(prompt_SP: Tensor, response_SR: Tensor, tokenizer: PreTrainedTokenizerBase) -> Answers:
    is_stop_SR = response_SR == tokenizer.eos_token_id
    mask_SR = is_stop_SR.cumsum(dim=1) - is_stop_SR.long() == 0
    return Answers(prompt_SP, response_SR, mask_SR, tokenizer.batch_decode(response_SR, skip_special_tokens=True))


@torch.no_grad()
def _next_token_logps(model: PreTrainedModel, answers: Answers) -> Tensor:
    """Log-probs [S, R, V], fp32, of every token of the vocabulary at every response position."""
    num_response = answers.response_SR.shape[1]
    ids_ST = torch.cat([answers.prompt_SP, answers.response_SR[:, :-1]], dim=1)
    logits_SRV = model(input_ids=ids_ST, use_cache=False, logits_to_keep=num_response).logits
    return logits_SRV.float().log_softmax(dim=-1)


def response_logp(model: PreTrainedModel, answers: Answers) -> Tensor:
    """The log-prob [S] of every answer, stop token included."""
    sums = []
    for batch in _batches(answers):
        token_SR = _next_token_logps(model, batch).gather(2, batch.response_SR[:, :, None])[:, :, 0]
        sums.append((token_SR * batch.mask_SR).sum(dim=1))
    return torch.cat(sums)


def kl(model: PreTrainedModel, initial_model: PreTrainedModel, answers: Answers) -> Tensor:
    """The exact next-token KL(model || initial) [S], in nats, summed over the positions of every answer."""
    sums = []
    for batch in _batches(answers):
        logps_SRV, initial_SRV = (_next_token_logps(each, batch) for each in (model, initial_model))
        kl_SR = (logps_SRV.exp() * (logps_SRV - initial_SRV)).sum(dim=-1)
        sums.append((kl_SR * batch.mask_SR).sum(dim=1))
    return torch.cat(sums)


def _batches(answers: Answers) -> Iterator[Answers]:
    for start in range(0, len(answers.text), BATCH):
        batch = slice(start, start + BATCH)
        yield Answers(answers.prompt_SP[batch], answers.response_SR[batch], answers.mask_SR[batch], answers.text[batch])
