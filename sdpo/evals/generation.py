"""Answers of a model to prompts, given once and kept; how far from S they were drawn; the formats of benchmarks.

Shapes: B conversations, T tokens.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel

from sdpo import distributed
from sdpo.console import progress
from sdpo.data.prompts import Prompt
from sdpo.data.templates import ChatFormat
from sdpo.data.tokenize import prompt_ids
from sdpo.errors import UserError
from sdpo.model import hub, sampling
from sdpo.model.attention.interface import own_attention
from sdpo.store import Artifact, key_of
from sdpo.train.runner import Runner

Answer = dict  # of one turn: text, prompt_ids, ids (the stop token included), ended (whether there is one)
LIBRARIES = {"torch": torch.__version__, "transformers": transformers.__version__}


class Decoding(NamedTuple):
    """Nothing is cut off: temperature alone changes a model's probabilities. `batch_size` enters, as padding does."""

    temperature: float  # 0: greedy
    max_new_tokens: int
    batch_size: int
    seed: int


def give(model: Artifact, asked: list[Prompt], decoding: Decoding, runner: Runner) -> list[list[Answer]]:
    """A model's answers to every turn of every prompt: found in the store, or generated, shared out over ranks.

    Raises UserError where a prompt and its answer are longer than the model can read.
    """
    template = runner.config.data.template
    determinants = {
        "weights": model.key,
        "prompts": asked,
        "template": template,
        "tokenizer": hub.fingerprint_tokenizer(runner.tokenizer),
        "decoding": decoding._asdict(),
        **runner.numerics.of_own_forward(),
        **LIBRARIES,
    }

    def generate() -> list[list[Answer]]:
        chat, turns, answers = ChatFormat(runner.tokenizer, template), [[] for _ in asked], [[] for _ in asked]
        network = _alone(model, runner)
        for turn in range(max(len(prompt.turns) for prompt in asked)):
            going = [i for i, prompt in enumerate(asked) if turn < len(prompt.turns)]
            for i in going:
                turns[i].append({"role": "user", "content": asked[i].turns[turn]})
            given = _generate(network, chat, prompt_ids(chat, [turns[i] for i in going]), decoding)
            for i, answer in zip(going, given, strict=True):
                turns[i].append({"role": "assistant", "content": answer["text"]})
                answers[i].append(answer)
        return answers

    return runner.store.make_json("answers", determinants, generate)


def divergence(
    model: Artifact, initial_model: Artifact, asked: list[Prompt], decoding: Decoding, runner: Runner
) -> list[float]:
    """KL(M_t, S) in nats per prompt: the exact next-token KL summed over the positions, EOS counted, of an answer
    that the model gives at temperature 1; over all answers where there are several turns."""
    drawn = decoding._replace(temperature=1.0)
    answers = give(model, asked, drawn, runner)
    determinants = {
        "suite": "divergence",
        "weights": model.key,
        "initial": initial_model.key,
        "answers": key_of("answers", {"answers": answers}),
        **runner.numerics.of_own_forward(),
        **LIBRARIES,
    }

    def compute() -> list[float]:
        with own_attention(_alone(model, runner)) as here, own_attention(_alone(initial_model, runner)) as there:
            mine = range(distributed.rank(), len(answers), distributed.world_size())
            shares = distributed.gather({i: sum(_kl(here, there, answer) for answer in answers[i]) for i in mine})
        sums = {i: value for share in shares for i, value in share.items()}
        return [sums[i] for i in range(len(answers))]

    return runner.store.make_json("evaluation", determinants, compute)


def write_formats(folder: Path, name: str, answered: list[dict]) -> None:
    """`<name>.alpaca_eval.json` (first turns) and `<name>.mt_bench.jsonl`, of what `told` says."""
    folder.mkdir(exist_ok=True)
    alpaca = [
        {"instruction": row["turns"][0], "output": row["answers"][0], "generator": name, "dataset": row["dataset"]}
        for row in answered
    ]
    (folder / f"{name}.alpaca_eval.json").write_text(json.dumps(alpaca, indent=1))
    answers = [
        {
            "question_id": row["id"],
            "answer_id": f"{name}-{row['id']}",
            "model_id": name,
            "choices": [{"index": 0, "turns": row["answers"]}],
        }
        for row in answered
    ]
    (folder / f"{name}.mt_bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))


def told(asked: list[Prompt], answers: list[list[Answer]]) -> list[dict]:
    """Prompts with the text of their answers."""
    texts = [[answer["text"] for answer in turns] for turns in answers]
    return [prompt._asdict() | {"answers": text} for prompt, text in zip(asked, texts, strict=True)]


def _alone(model: Artifact, runner: Runner) -> PreTrainedModel:
    """A copy on this rank's device, in the run's precision, while the workbench holds nothing."""
    runner.release()
    return hub.cast(runner.load_verified(model), runner.device, hub.DTYPES[runner.config.precision])


def _generate(network: PreTrainedModel, chat: ChatFormat, prompts: list[list[int]], decoding: Decoding) -> list[Answer]:
    """An answer to every prompt. A batch's random numbers follow from the seed and its place, not from its rank."""
    longest = max(map(len, prompts)) + decoding.max_new_tokens
    room = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    if room and longest > room:
        raise UserError(
            f"the model reads {room} tokens, but the longest prompt and its answer may have {longest}; "
            f"lower max_new_tokens={decoding.max_new_tokens} or shorten the prompt"
        )
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches = [order[i : i + decoding.batch_size] for i in range(0, len(order), decoding.batch_size)]
    stops = [id for id in dict.fromkeys((chat.stop, chat.tokenizer.eos_token_id)) if id is not None]
    network.generation_config = _settings(decoding, stops)  # a model's own may cut its probabilities off
    answers: dict[int, Answer] = {}
    with (
        own_attention(network),
        torch.random.fork_rng(),
        progress(len(prompts), "answers", "prompts", quiet=not distributed.is_main()) as bar,
    ):
        for place in range(distributed.rank(), len(batches), distributed.world_size()):
            members = batches[place]
            torch.manual_seed(decoding.seed * len(batches) + place)
            for i, ids in zip(members, _continue(network, [prompts[i] for i in members], stops), strict=True):
                ended = ids[-1] in stops
                text = chat.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
                answers[i] = {"text": text, "prompt_ids": prompts[i], "ids": ids, "ended": ended}
            bar.advance(len(members))
    answers = {i: answer for share in distributed.gather(answers) for i, answer in share.items()}
    return [answers[i] for i in range(len(prompts))]


def _settings(decoding: Decoding, stops: list[int]) -> GenerationConfig:
    drawn = {"do_sample": True, "temperature": decoding.temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        **(drawn if decoding.temperature else {"do_sample": False}),
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=stops,
        pad_token_id=stops[0],
    )


def _continue(network: PreTrainedModel, prompts: list[list[int]], stops: list[int]) -> list[list[int]]:
    """What follows each prompt, up to and including its first stop token."""
    width = max(map(len, prompts))
    padded = [[stops[0]] * (width - len(ids)) + ids for ids in prompts]
    seen = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    tokens_BT, mask_BT = (torch.tensor(rows, device=network.device) for rows in (padded, seen))
    responses = network.generate(tokens_BT, attention_mask=mask_BT)[:, width:].tolist()
    ends = [next((i + 1 for i, id in enumerate(ids) if id in stops), len(ids)) for ids in responses]
    return [ids[:end] for ids, end in zip(responses, ends, strict=True)]


def _kl(here: PreTrainedModel, there: PreTrainedModel, answer: Answer) -> float:
    prompt_1T, response_1T = (torch.tensor([answer[name]], device=here.device) for name in ("prompt_ids", "ids"))
    whole = sampling.Answers(prompt_1T, response_1T, torch.ones_like(response_1T, dtype=torch.bool), [answer["text"]])
    return sampling.kl(here, there, whole).item()
