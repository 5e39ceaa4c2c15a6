"""Chooses a protocol of judging, and judges a model's answers by it; verdicts are kept in the store."""

from pathlib import Path
from typing import Any

from sdpo import distributed
from sdpo.errors import UserError
from sdpo.evals.judge.alpaca import AlpacaEval
from sdpo.evals.judge.arena_hard import ArenaHard
from sdpo.evals.judge.case import Case, Rules
from sdpo.evals.judge.chat_endpoint import Endpoint
from sdpo.evals.judge.mt_bench import MTBench
from sdpo.evals.judge.pairwise import Own
from sdpo.stats import Measures
from sdpo.store.artifacts import Store, key_of


def choose(protocol: str, references: str | None, opponent: str | None) -> Rules:
    """The protocol of a name (`own`, `alpaca_eval:ANNOTATOR`) or of a benchmark's file.

    Raises UserError for an unknown name, and for settings that the protocol does not read.
    """
    name, _, annotator = protocol.partition(":")
    rules: Rules
    if protocol == "own":
        rules = Own()
    elif name == "alpaca_eval":
        rules = AlpacaEval(annotator)
    elif Path(protocol).suffix in (".yaml", ".yml"):
        rules = ArenaHard(protocol)
    elif Path(protocol).suffix == ".jsonl":
        rules = MTBench(protocol, references)
    else:
        raise UserError(
            f"evaluate.judge.protocol={protocol} is not known; it can be own, alpaca_eval:ANNOTATOR, FastChat's "
            "judge_prompts.jsonl, or a config .yaml of Arena-Hard"
        )
    if opponent and not rules.pairwise:
        raise UserError(f"{protocol} grades single answers and reads no evaluate.judge.opponent: remove it")
    if references and not isinstance(rules, MTBench):
        raise UserError(f"protocol={protocol} reads no evaluate.judge.references: remove it")
    return rules


def measure(rules: Rules, case: Case, endpoint: Endpoint, of: dict[str, Any], store: Store) -> Measures:
    """The measures of verdicts that are asked for, or that the store has; `of` says whose answers they are on.

    Raises UserError as `sdpo.evals.judge.chat_endpoint.ask` does.
    """
    answers = [case.first, case.theirs] if rules.pairwise else case.ours
    options = {"temperature": endpoint.temperature, "top_logprobs": endpoint.top_logprobs}
    determinants = {
        **of,
        "url": endpoint.url,
        "judge": endpoint.model,
        "max_tokens": endpoint.max_tokens,
        **{name: value for name, value in options.items() if value},
        **rules.label,
        "answers": key_of("answers", {"asked": [prompt.turns[0] for prompt in case.prompts], "of": answers}),
    }

    def compute() -> list:
        return distributed.broadcast(rules.verdicts(case, endpoint, store) if distributed.is_main() else None)

    return rules.measures(store.make_json("judgements", determinants, compute), case)
