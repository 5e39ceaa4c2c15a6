"""What a judge is given, how it is asked, and what every protocol of asking does."""

from typing import Any, NamedTuple, Protocol

from sdpo.data.prompts import Prompt
from sdpo.evals.judge.chat_endpoint import Endpoint
from sdpo.stats import Measures
from sdpo.store.artifacts import Store

MODEL = "M_t"  # the name of the judged model in rows of verdicts


class Asking(NamedTuple):
    """How a judge is asked; fields are those of Endpoint."""

    max_tokens: int
    temperature: float = 0.0
    top_logprobs: int | None = None


class Case(NamedTuple):
    """Answers that are to be judged."""

    prompts: list[Prompt]
    ours: list[list[str]]  # the model's answers to every turn of each prompt
    theirs: list[str]  # its opponent's answers to the first turns; empty if the protocol needs none
    opponent: str  # its name

    @property
    def first(self) -> list[str]:
        """The model's answers to the first turns."""
        return [turns[0] for turns in self.ours]

    @property
    def longer(self) -> list[float]:
        """How many characters longer than its opponent's each of the model's first answers is."""
        return [float(len(a) - len(b)) for a, b in zip(self.first, self.theirs, strict=True)]


class Rules(Protocol):
    """A protocol of judging: what is asked, how replies are read, and how verdicts become measures."""

    label: dict[str, Any]  # what replies depend on, for keys, and to stand beside every reply
    asking: Asking
    pairwise: bool  # whether there is an opponent

    def check(self, prompts: list[Prompt]) -> None:
        """Raise UserError if these prompts cannot be judged; nothing was asked so far."""

    def verdicts(self, case: Case, endpoint: Endpoint, store: Store) -> list:
        """The verdicts as JSON. Raises UserError as `sdpo.evals.judge.chat_endpoint.ask` does."""

    def measures(self, verdicts: list, case: Case) -> Measures:
        """Measures by name; each says by `version` what it depends on."""


def labelled(measures: Measures, *parts: str) -> Measures:
    """Measures of rows of verdicts under the judge's name, with what they depend on."""
    version = {"version": ", ".join(dict.fromkeys(part for part in parts if part))}
    return {f"judge/{name}": measure | version for name, measure in measures.items()}
