"""Answers of a model to prompts of the laboratory: sampled, scored, and compared with another model's.

All prompts have one length, so that a batch needs no padding before the answer.
Shapes: N prompts, S answers, P prompt tokens, R response tokens (padded with the stop token), V vocabulary.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST_TOKENS = 16  # in an answer: six letters, ten fillers that bring the gold reward to zero
AT_ONCE = 256  # answers that are scored together: more no longer fit a processor cache, and take twice the time


class Answers(NamedTuple):
    """Token ids of prompts and answers; `mask_SR` is true up to and including the first stop token."""

    prompt_SP: Tensor
    response_SR: Tensor
    mask_SR: Tensor
    text: list[str]


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    num_samples: int,
    seed: int | None,
) -> Answers:
    """`num_samples` answers per prompt, a prompt's answers together: temperature 1, nothing cut off.

    With seed None the one greedy answer. The same seed gives every model the same random numbers.
    """
    prompt_NP = tokenizer(prompts, return_tensors="pt")["input_ids"].to(model.device)
    random_numbers = {"do_sample": False} if seed is None else {"do_sample": True, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng():
        torch.manual_seed(seed or 0)
        whole = model.generate(
            prompt_NP,
            attention_mask=torch.ones_like(prompt_NP),
            num_return_sequences=num_samples,
            max_new_tokens=MOST_TOKENS,
            pad_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **random_numbers,
        )
    return _answers(whole[:, : prompt_NP.shape[1]], whole[:, prompt_NP.shape[1] :], tokenizer)


def given(tokenizer: PreTrainedTokenizerBase, prompts: list[str], texts: list[str], device: torch.device) -> Answers:
    """Answers that were written elsewhere, one per prompt."""
    stop = tokenizer.eos_token
    responses = tokenizer([text + stop for text in texts], padding=True, padding_side="right", return_tensors="pt")
    prompt_SP = tokenizer(prompts, return_tensors="pt")["input_ids"].to(device)
    return _answers(prompt_SP, responses["input_ids"].to(device), tokenizer)


def _answers(prompt_SP: Tensor, response_SR: Tensor, tokenizer: PreTrainedTokenizerBase) -> Answers:
    is_stop_SR = response_SR == tokenizer.eos_token_id
    mask_SR = is_stop_SR.cumsum(dim=1) - is_stop_SR.long() == 0
    return Answers(prompt_SP, response_SR, mask_SR, tokenizer.batch_decode(response_SR, skip_special_tokens=True))


@torch.no_grad()
def logps(model: PreTrainedModel, answers: Answers) -> Tensor:
    """The log-probability of every token that could stand at a response position: [S, R, V], fp32."""
    num_response = answers.response_SR.shape[1]
    ids_ST = torch.cat([answers.prompt_SP, answers.response_SR[:, :-1]], dim=1)
    logits_SRV = model(input_ids=ids_ST, use_cache=False, logits_to_keep=num_response).logits
    return logits_SRV.float().log_softmax(dim=-1)


def response_logp(model: PreTrainedModel, answers: Answers) -> Tensor:
    """The log-probability of every answer, its stop token counted: [S]."""
    return torch.cat([_response_logp(model, some) for some in _portions(answers)])


def _response_logp(model: PreTrainedModel, answers: Answers) -> Tensor:
    token_SR = logps(model, answers).gather(2, answers.response_SR[:, :, None])[:, :, 0]
    return (token_SR * answers.mask_SR).sum(dim=1)


def kl(model: PreTrainedModel, initial_model: PreTrainedModel, answers: Answers) -> Tensor:
    """The exact next-token KL(model || initial) summed over the positions of every answer: [S]."""
    return torch.cat([_kl(model, initial_model, some) for some in _portions(answers)])


def _kl(model: PreTrainedModel, initial_model: PreTrainedModel, answers: Answers) -> Tensor:
    here_SRV, there_SRV = logps(model, answers), logps(initial_model, answers)
    return ((here_SRV.exp() * (here_SRV - there_SRV)).sum(dim=-1) * answers.mask_SR).sum(dim=1)


def _portions(answers: Answers) -> Iterator[Answers]:
    for at in range(0, len(answers.text), AT_ONCE):
        yield Answers(*(part[at : at + AT_ONCE] for part in answers))
