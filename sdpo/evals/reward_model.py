"""Rewards of pairs: by the model before fine-tuning, by reward models, and the accuracy of implicit ones.

Shape suffixes: N pairs; columns are the chosen and the rejected response; B sequences of one length, T tokens.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from sdpo import config, distributed
from sdpo.config import Settings
from sdpo.console import Progress
from sdpo.data import preferences
from sdpo.data.pair_table import PairTable
from sdpo.data.preferences import Pair
from sdpo.data.readers import READERS
from sdpo.data.templates import Writer
from sdpo.data.tokenize import content_hash, encode
from sdpo.errors import UserError
from sdpo.model import hub, rotary
from sdpo.model.memory import scoring_budget
from sdpo.stats import Measures, mean, share
from sdpo.store.artifacts import Artifact
from sdpo.train.reference_windows import external
from sdpo.train.runner import Runner
from sdpo.types import TokenPair

SECTIONS = {  # of RewardBench (Lambert et al. 2403.13787), as its rewardbench/constants.py has them
    "chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "chat_hard": (
        *("mt-bench-hard", "llmbar-natural", "llmbar-adver-neighbor", "llmbar-adver-GPTInst"),
        *("llmbar-adver-GPTOut", "llmbar-adver-manual"),
    ),
    "safety": (
        *("refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond"),
        "donotanswer",
    ),
    "reasoning": ("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
}
UPWEIGHTED = {"math-prm": 984}  # counts as many pairs as the code of its section


def base_logps(settings: Settings, rows: list[TokenPair], runner: Runner) -> np.ndarray:
    """Summed log-probs [N, 2] of the same tokens under the model before fine-tuning, which is at `path`.

    Raises UserError if that model has another tokenizer than the run's model.
    """
    base = external(settings)
    theirs, ours = hub.load_tokenizer(base.folder).get_vocab(), runner.tokenizer.get_vocab()
    ids = set(np.unique(np.concatenate([part for row in rows for part in row.ids])).tolist())
    differ = sorted(token for token, id in ours.items() if id in ids and theirs.get(token) != id)
    if differ:
        raise UserError(
            f"score.path: in {settings['path']} {differ[0]!r} is another token than in the run's model; "
            "an implicit reward compares the same tokens: name the model that S was trained from"
        )
    return runner.logprobs(base, rows)


def rewards(settings: Settings, pairs: list[Pair], runner: Runner) -> np.ndarray:
    """Rewards [N, 2] that the sequence classifier at `path` gives to whole conversations in its own tokens.

    Equal conversations are read once, so that rounding gives them equal rewards. They are kept in the store. Raises
    UserError if the model is not a reward model, or a conversation is too long for it.
    """
    model = external(settings)
    rows = _encode(pairs, model, settings, runner)

    def compute() -> list:
        runner.release()
        distinct = {ids.tobytes(): ids for row in rows for ids in (row.chosen, row.rejected)}
        found = _classify(_load(model, runner), list(distinct.values()), runner).tolist()
        reward = dict(zip(distinct, found, strict=True))
        return [[reward[ids.tobytes()] for ids in (row.chosen, row.rejected)] for row in rows]

    return np.array(runner.store.make_json("score", _determinants(model, rows, runner), compute))


def read_pairs(names: list[str], columns: dict[str, str] | None, max_tokens: int, runner: Runner) -> PairTable:
    """Preference pairs of files, or of data sets of the Hub, in the template of the run; their sources are categories.

    Raises UserError as `data.train` does, and for every pair that would be dropped or cut.
    """
    is_local = all(Path(name).suffix.lower() in READERS for name in names)
    settings = config.Data(  # of the run's own only the template: its limits and revisions are those of other pairs
        name="local" if is_local else "hub",
        train=names,
        held_out_share=0.0,
        columns=columns or {},
        source_from="row" if "source" in (columns or {}) else "file",
        template=runner.config.data.template,
        template_date=runner.config.data.template_date,
        max_tokens=max_tokens,
    )
    pairs = preferences.load(settings).train
    rows, _ = encode(pairs, runner.tokenizer, settings, "evaluation", limit="evaluate.reward_bench.max_tokens")
    if lost := [pair.id for pair in pairs if pair.id not in rows]:
        raise UserError(f"{', '.join(names)}: the responses of pair {lost[0]} are the same tokens; remove the pair")
    return PairTable.join(pairs, rows)


def accuracies(right_N: np.ndarray, categories_N: np.ndarray) -> Measures:
    """The accuracy of all pairs, of every category, and the mean over categories; `score` is RewardBench's own.

    It is there if all of RewardBench's categories are: the mean of its sections, which are means over pairs.
    """
    by_category = {category: share(right_N[categories_N == category]) for category in dict.fromkeys(categories_N)}
    measures = {f"{category}/accuracy": measure for category, measure in by_category.items()}
    known = [measure["value"] for measure in by_category.values() if measure["value"] is not None]
    measures |= {"accuracy": share(right_N), "mean_of_categories": mean(known)}
    if by_category.keys() >= {category for members in SECTIONS.values() for category in members}:
        sections = {}
        for section, members in SECTIONS.items():
            weights = [UPWEIGHTED.get(category, np.sum(categories_N == category)) for category in members]
            sections[section] = np.average(
                [right_N[categories_N == category].mean() for category in members], weights=weights
            )
        measures |= {f"sections/{section}": mean([value]) for section, value in sections.items()}
        measures["score"] = mean([np.mean(list(sections.values()))])
    return measures


def has_base_logps(settings: Settings, rows: list[TokenPair], runner: Runner) -> bool:
    """Whether the store has what `base_logps` reads."""
    return runner.has_logprobs(external(settings), rows)


def has_rewards(settings: Settings, pairs: list[Pair], runner: Runner) -> bool:
    """Whether the store has what `rewards` reads."""
    model = external(settings)
    rows = _encode(pairs, model, settings, runner)
    return runner.store.holds("score", _determinants(model, rows, runner))


def _determinants(model: Artifact, rows: list[TokenPair], runner: Runner) -> dict[str, Any]:
    return {"reward_model": model.key, "rows": content_hash(rows), **runner.numerics.of_own_forward()}


def _encode(pairs: list[Pair], model: Artifact, settings: Settings, runner: Runner) -> list[TokenPair]:
    """Both conversations of a pair as whole sequences, as the template ends them; the prompt is empty."""
    tokenizer, template = hub.load_tokenizer(model.folder), settings["template"]
    writer = Writer(tokenizer, template, runner.config.data.template_date)

    def tokens(pair: Pair, answer: str) -> np.ndarray:
        turns = [*pair.prompt, {"role": "assistant", "content": answer}]
        text = writer.write(writer.harmless(turns)[0], inputs=writer.harmless(pair.inputs)[0])
        # A tokenizer's own template writes its special tokens itself.
        return np.array(tokenizer(text, add_special_tokens=template is not None).input_ids, dtype=np.int32)

    nothing = np.zeros(0, dtype=np.int32)
    return [TokenPair(pair.id, nothing, tokens(pair, pair.chosen), tokens(pair, pair.rejected)) for pair in pairs]


def _load(model: Artifact, runner: Runner) -> PreTrainedModel:
    network, report = AutoModelForSequenceClassification.from_pretrained(
        model.folder, dtype=hub.DTYPES[runner.config.precision], use_safetensors=True, output_loading_info=True
    )
    if report["missing_keys"]:
        raise UserError(f"{model.folder} is not a reward model: it has no {min(report['missing_keys'])}")
    if network.config.num_labels != 1:
        raise UserError(f"{model.folder} has {network.config.num_labels} labels, but a reward model has one")
    return network.eval().to(runner.device)


def _classify(network: PreTrainedModel, sequences: list[np.ndarray], runner: Runner) -> np.ndarray:
    """The reward of every sequence. Batches hold sequences of one length, so that nothing is padded; ranks divide them.

    Raises UserError if a sequence is longer than the model can read.
    """
    text_config = network.config.get_text_config()
    longest, context_length = max(map(len, sequences)), rotary.longest_readable(text_config)
    if longest > context_length:
        raise UserError(f"the reward model reads {context_length:.0f} tokens, but one conversation has {longest}")
    if text_config.pad_token_id is None:
        text_config.pad_token_id = -1  # no token is padding, but transformers refuses batches if this is not set
    batches = _batches(sequences, scoring_budget(runner.config.launch))[distributed.rank() :: distributed.world_size()]
    rewards = torch.zeros(len(sequences), device=runner.device, dtype=network.dtype)
    with torch.no_grad(), Progress(len(sequences), "rewards", "answers") as bar:
        for members in batches:
            tokens_BT = torch.from_numpy(np.stack([sequences[i] for i in members])).long().to(runner.device)
            rewards[members] = network(input_ids=tokens_BT, attention_mask=torch.ones_like(tokens_BT)).logits[:, 0]
            bar.advance(len(members))
    return distributed.total(rewards.float()).cpu().numpy()


def _batches(sequences: list[np.ndarray], budget: int) -> list[list[int]]:
    """Batches as indices of sequences of equal length, with at most `budget` tokens unless one sequence has more."""
    by_length = defaultdict(list)
    for i, ids in enumerate(sequences):
        by_length[len(ids)].append(i)
    return [
        members[begin : begin + size]
        for length, members in sorted(by_length.items())
        for size in [max(1, budget // length)]
        for begin in range(0, len(members), size)
    ]
