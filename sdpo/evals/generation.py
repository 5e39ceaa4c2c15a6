"""Answers of a model to prompts, generated once and kept."""

from typing import TypedDict, cast

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel

from sdpo import distributed
from sdpo.console import Progress
from sdpo.data.prompt_and_answer import ChatFormat
from sdpo.data.prompts import Prompt
from sdpo.data.schemas import Message, Turns
from sdpo.data.tokenize import prompt_ids
from sdpo.evals.decoding import Decoding
from sdpo.model import hub, limits
from sdpo.model.attention.interface import own_attention
from sdpo.model.sampling import continuations
from sdpo.store.artifacts import Artifact, key_of
from sdpo.train.runner import Runner

LIBRARIES = {"torch": torch.__version__, "transformers": transformers.__version__}


class Answer(TypedDict):
    """A model's answer to one turn of a prompt."""

    text: str
    prompt_ids: list[int]  # of the whole conversation before the answer
    ids: list[int]  # with the stop token
    ended: bool  # whether there is a stop token


def answers(model: Artifact, prompts: list[Prompt], decoding: Decoding, runner: Runner) -> list[list[Answer]]:
    """A model's answers to every turn of every prompt: from the store, or generated, divided over the ranks.

    Raises UserError if a prompt and its answer are longer than the model can read, and if a prompt is of a category
    without a temperature.
    """
    if not isinstance(decoding.temperature, dict):
        return _answers(model, prompts, decoding, runner)
    found: dict[int, list[Answer]] = {}
    for settings in dict.fromkeys(map(decoding.for_prompt, prompts)):
        members = [i for i, prompt in enumerate(prompts) if decoding.for_prompt(prompt) == settings]
        found |= zip(members, _answers(model, [prompts[i] for i in members], settings, runner), strict=True)
    return [found[i] for i in range(len(prompts))]


def _answers(model: Artifact, prompts: list[Prompt], decoding: Decoding, runner: Runner) -> list[list[Answer]]:
    template, chat = runner.config.data.template, runner.chat
    first_turns = prompt_ids(chat, [prompt.opening() for prompt in prompts])
    determinants = {
        "weights": model.key,
        "prompts": [prompt.determinants() for prompt in prompts],
        # A tokenizer's own template may read the clock.
        "template": template or key_of("prompts", {"ids": first_turns}),
        "tokenizer": hub.fingerprint_tokenizer(runner.tokenizer),
        "decoding": decoding.determinants(),
        **runner.determinants_of_stops(),
        **runner.numerics.of_own_forward(),
        **LIBRARIES,
    }

    def answer_all_turns() -> list[list[Answer]]:
        network = load_alone(model, runner)
        conversations: list[Turns] = [prompt.before for prompt in prompts]
        answers_of: list[list[Answer]] = [[] for _ in prompts]
        for turn in range(max(len(prompt.turns) for prompt in prompts)):
            unfinished = [i for i, prompt in enumerate(prompts) if turn < len(prompt.turns)]
            for i in unfinished:
                conversations[i] += (Message(role="user", content=prompts[i].turns[turn]),)
            encoded = prompt_ids(chat, [conversations[i] for i in unfinished])
            for i, answer in zip(unfinished, generate(network, chat, encoded, decoding), strict=True):
                conversations[i] += (Message(role="assistant", content=answer["text"]),)
                answers_of[i].append(answer)
        return answers_of

    return cast(list[list[Answer]], runner.store.make_json("answers", determinants, answer_all_turns))


def load_alone(model: Artifact, runner: Runner) -> PreTrainedModel:
    """The model on this rank's device in the run's precision; the runner's own model is unloaded before."""
    runner.release()
    network = runner.load_verified(model)
    hub.cast(network, runner.device, hub.DTYPES[runner.config.precision])
    return network


def generate(network: PreTrainedModel, chat: ChatFormat, prompts: list[list[int]], decoding: Decoding) -> list[Answer]:
    """An answer to every prompt, divided over the ranks.

    A batch's random numbers depend on the seed and its number, not on its rank. Raises UserError if a prompt and its
    answer are longer than the model can read.
    """
    limits.check_answers(prompts, decoding.max_new_tokens, network.config, "max_new_tokens", "the prompt")
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches = [order[i : i + decoding.batch_size] for i in range(0, len(order), decoding.batch_size)]
    network.generation_config = _generation_config(decoding, chat.stops)  # the model's own may cut off probabilities
    own: dict[int, Answer] = {}
    with (
        own_attention(network),
        torch.random.fork_rng(),
        Progress(len(prompts), "answers", "prompts") as bar,
    ):
        for number in range(distributed.rank(), len(batches), distributed.world_size()):
            members = batches[number]
            torch.manual_seed(decoding.seed * len(batches) + number)
            for i, ids in zip(members, continuations(network, [prompts[i] for i in members], chat.stops), strict=True):
                ended = ids[-1] in chat.stops
                text = cast(str, chat.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True))
                own[i] = {"text": text, "prompt_ids": prompts[i], "ids": ids, "ended": ended}
            bar.advance(len(members))
    return distributed.gather_numbered(own)


def _generation_config(decoding: Decoding, stops: list[int]) -> GenerationConfig:
    sampling_settings = {"do_sample": True, "temperature": decoding.temperature, "top_k": 0, "top_p": decoding.top_p}
    return GenerationConfig(
        **(sampling_settings if decoding.temperature else {"do_sample": False}),
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=stops,
        pad_token_id=stops[0],
    )
