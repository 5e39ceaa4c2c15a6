"""MT-Bench's grading of single answers, with the prompts of FastChat's judge_prompts.jsonl."""

import re
from typing import Any

from sdpo.data.cells import BadRow, parse_row
from sdpo.data.prompts import Prompt
from sdpo.data.readers import read_file
from sdpo.errors import UserError
from sdpo.evals import result_files
from sdpo.evals.judge import answer_files
from sdpo.evals.judge.case import MODEL, Asking, Case, labelled
from sdpo.evals.judge.chat_endpoint import Conversation, Endpoint, ask, digest
from sdpo.stats import Measures
from sdpo.store.artifacts import Store

NAMES = ("single-v1", "single-v1-multi-turn", "single-math-v1", "single-math-v1-multi-turn")
WITH_REFERENCE = ("math", "reasoning", "coding")  # categories that are graded beside a reference answer
RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))  # the second one if the first finds none


class MTBench:
    """The four prompts of NAMES, which grade first and second turns, with and without a reference answer."""

    pairwise = False
    asking = Asking(2048)

    def __init__(self, file: str, references: str | None):
        """`references` is FastChat's reference_answer/gpt-4.jsonl. Raises UserError for another layout of the file."""
        try:
            rows = [parse_row(row) for _, row in read_file(file).rows]
            prompts = {row["name"]: row for row in rows if row["name"] in NAMES}
            self.prompts = {name: (prompts[name]["system_prompt"], prompts[name]["prompt_template"]) for name in NAMES}
            for name in NAMES:
                if prompts[name]["output_format"] != "[[rating]]":
                    raise ValueError(f"output_format of {name}")
                self._conversation(name, ["q1", "q2"], ["a1", "a2"], ["r1", "r2"])
        except (BadRow, LookupError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file}: is not FastChat's judge_prompts.jsonl ({error!r}); MT-Bench grades with {', '.join(NAMES)}"
            ) from error
        self.references = references
        self.label = {"protocol": "MT-Bench", "prompt": digest(self.prompts)}

    def check(self, prompts: list[Prompt]) -> None:
        """Raise UserError if a prompt has more than two turns, or none of the reference answers that it needs."""
        if long := [prompt for prompt in prompts if len(prompt.turns) > 2]:
            raise UserError(f"prompt {long[0].id} has {len(long[0].turns)} turns; MT-Bench grades one or two")
        self._references(prompts)

    def verdicts(self, case: Case, endpoint: Endpoint, store: Store) -> list[dict[str, Any]]:
        """A score for every turn, as FastChat's files of judgments have it; -1 if the judge states none."""
        turns = [(i, turn) for i, prompt in enumerate(case.prompts) for turn in range(1, 1 + len(prompt.turns))]
        found = self._references(case.prompts)
        asked = [
            self._conversation(
                f"single{'-math' if i in found else ''}-v1{'-multi-turn' if turn == 2 else ''}",
                case.prompts[i].turns,
                case.ours[i],
                found.get(i, []),
            )
            for i, turn in turns
        ]
        replies = ask(endpoint, asked, {"judge": endpoint.model} | self.label, store)
        return [
            self.label
            | {
                "question_id": case.prompts[i].id,
                "model": MODEL,
                "turn": turn,
                "score": rating(reply.text),
                "version": reply.version,
            }
            for (i, turn), reply in zip(turns, replies, strict=True)
        ]

    def measures(self, verdicts: list[dict[str, Any]], case: Case) -> Measures:
        """Mean scores from 1 to 10: of all turns, and of first and second turns."""
        versions = (row["version"] for row in verdicts)
        return labelled(result_files.mt_bench(verdicts)[MODEL], *versions, "MT-Bench", f"prompt {self.label['prompt']}")

    def _references(self, prompts: list[Prompt]) -> dict[int, list[str]]:
        """The reference answers by position, of prompts in WITH_REFERENCE."""
        needing = {i: prompt for i, prompt in enumerate(prompts) if prompt.dataset in WITH_REFERENCE}
        if needing and self.references is None:
            raise UserError(
                f"prompts of {', '.join(WITH_REFERENCE)} are graded beside a reference answer: set "
                "evaluate.judge.references to FastChat's data/mt_bench/reference_answer/gpt-4.jsonl"
            )
        if not needing or self.references is None:
            return {}
        answers = answer_files.read(self.references, list(needing.values())).answers
        if short := [p for p, said in zip(needing.values(), answers, strict=True) if len(said) < len(p.turns)]:
            raise UserError(f"{self.references}: has no reference answer to the second turn of prompt {short[0].id}")
        return dict(zip(needing, answers, strict=True))

    def _conversation(self, name: str, turns: list[str], answers: list[str], references: list[str]) -> Conversation:
        system, template = self.prompts[name]
        texts = {"question": turns[0], "answer": answers[0]}
        for key, said in (("question", turns), ("answer", answers), ("ref_answer", references)):
            texts |= {f"{key}_{number}": text for number, text in enumerate(said, 1)}
        return [{"role": "system", "content": system}, {"role": "user", "content": template.format(**texts)}]


def rating(text: str) -> float:
    """The first rating in a reply; -1 if there is none."""
    found = next(filter(None, (pattern.search(text) for pattern in RATINGS)), None)
    return float(found[1]) if found else -1.0
