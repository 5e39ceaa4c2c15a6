"""Our own protocol: which of two answers a language model prefers.

It is asked in both orders, because judges favour a position.
"""

import re
from typing import NamedTuple

import numpy as np

from sdpo.data.prompts import Prompt
from sdpo.evals.judge.case import Asking, Case
from sdpo.evals.judge.chat_endpoint import Conversation, Endpoint, ask, digest
from sdpo.stats import Measures, length_controlled, mean, share
from sdpo.store.artifacts import Store

RULES = """\
You compare two answers to the same question. Judge how well each one does what the question asks: whether it is \
correct, helpful, relevant and complete. Neither the order of the answers nor their length may influence you. \
Explain your judgement in a few sentences. Then end with exactly one of these: [[A]] if answer A is better, \
[[B]] if answer B is better, [[C]] if neither is."""
VERDICT = re.compile(r"\[\[([ABC])\]\]")
WINS = {"A": 1.0, "B": 0.0, "C": 0.5}  # of answer A


class Judgement(NamedTuple):
    """The verdicts on one prompt, from the model's side: 1 if it wins, 0 if it loses, one half for a tie, or None if
    the judge stated none. `first` is that of the order in which the model's answer comes first."""

    id: int | str
    first: float | None
    second: float | None
    version: str  # of the judge, as the endpoint names it


def conversation(question: str, a: str, b: str) -> Conversation:
    """What the judge is asked."""
    text = f"# Question\n\n{question}\n\n# Answer A\n\n{a}\n\n# Answer B\n\n{b}"
    return [{"role": "system", "content": RULES}, {"role": "user", "content": text}]


PROMPT_HASH = digest(conversation("question", "a", "b"))


def compare(
    endpoint: Endpoint, prompts: list[Prompt], ours: list[str], theirs: list[str], store: Store
) -> list[Judgement]:
    """The judge's verdicts on the two answers to every prompt (first turns). Raises UserError as `ask` does."""
    texts = list(zip([prompt.turns[0] for prompt in prompts], ours, theirs, strict=True))
    both_orders = [conversation(q, a, b) for q, a, b in texts] + [conversation(q, b, a) for q, a, b in texts]
    replies = ask(endpoint, both_orders, {"judge": endpoint.model, "prompt": PROMPT_HASH}, store)
    wins = [win_of_a(reply.text) for reply in replies]
    judgements = []
    for i, prompt in enumerate(prompts):
        loss, versions = wins[len(prompts) + i], dict.fromkeys(replies[k].version for k in (i, len(prompts) + i))
        judgements.append(Judgement(prompt.id, wins[i], None if loss is None else 1 - loss, ", ".join(versions)))
    return judgements


def win_of_a(text: str) -> float | None:
    """1 if a reply's last verdict is for answer A, 0 for B, one half for a tie; None if it states no verdict."""
    verdicts = VERDICT.findall(text)
    return WINS[verdicts[-1]] if verdicts else None


def rates(name: str, judgements: list[Judgement], longer: np.ndarray) -> Measures:
    """The win rate, also at equal length, and how the judge behaved.

    `longer` [N] is the length of the model's answer minus that of its opponent. A prompt's win is the mean over both
    orders; a prompt with an unreadable verdict has none.
    """
    verdicts_N2 = np.array([[j.first, j.second] for j in judgements], dtype=np.float64).reshape(-1, 2)
    readable_N2 = ~np.isnan(verdicts_N2)
    both_N = readable_N2.all(axis=1)
    wins, (first, second) = verdicts_N2[both_N].mean(axis=1), verdicts_N2[both_N].T
    versions = dict.fromkeys(judgement.version for judgement in judgements)
    label = {"version": ", ".join([*versions, f"prompt {PROMPT_HASH}"])}
    measures = {
        name: share(wins),
        f"{name}/length_controlled": length_controlled(wins, longer[both_N]) if both_N.any() else mean([]),
        f"{name}/longer": mean(longer),
        f"{name}/orders_agree": share(first == second),
        f"{name}/first_preferred": share((first + 1 - second) / 2),  # one half: the judge favours no position
        f"{name}/unreadable": share(~readable_N2.ravel()),
    }
    return {key: measure | label for key, measure in measures.items()}


class Own:
    """Our own prompt."""

    pairwise = True
    asking = Asking(1024)
    label = {"prompt": PROMPT_HASH}

    def check(self, prompts: list[Prompt]) -> None:
        """All prompts can be judged."""

    def verdicts(self, case: Case, endpoint: Endpoint, store: Store) -> list:
        """A Judgement of every prompt."""
        return compare(endpoint, case.prompts, case.first, case.theirs, store)

    def measures(self, verdicts: list, case: Case) -> Measures:
        """The rates of `rates`, against S or against another model, which is named."""
        found = rates("judge", [Judgement(*given) for given in verdicts], np.array(case.longer))
        if case.opponent == "S":
            return found
        return {name: one | {"version": f"{one['version']}, against {case.opponent}"} for name, one in found.items()}
