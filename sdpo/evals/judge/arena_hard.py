"""Arena-Hard's judge, from its own config file: two games per prompt, and verdicts that may be strong."""

import re
from pathlib import Path
from typing import Any

import yaml

from sdpo.data.prompts import Prompt
from sdpo.errors import UserError, one_line
from sdpo.evals import result_files
from sdpo.evals.judge.case import MODEL, Asking, Case, labelled
from sdpo.evals.judge.chat_endpoint import Conversation, Endpoint, ask, digest
from sdpo.stats import Measures
from sdpo.store.artifacts import Store

OF_COMMAND = {"judge_model", "bench_name", "model_list"}  # what Arena-Hard's own command reads, and we do not
NEEDED = {"system_prompt", "prompt_template", "regex_patterns", "temperature", "max_tokens"}
FIELDS = ("QUESTION", "ANSWER_A", "ANSWER_B")


class ArenaHard:
    """The judge of a file config/arena-hard-*.yaml."""

    pairwise = True

    def __init__(self, file: str):
        """Raises UserError for another layout, also if there is no `system_prompt`, which Arena-Hard has in its code.

        It stands there in utils/judge_utils.py, by category.
        """
        try:
            self.given = yaml.safe_load(Path(file).read_text())
            if self.given.pop("reference", None):
                raise ValueError("reference: judging with a reference answer is not built")
            if unread := self.given.keys() - NEEDED - OF_COMMAND:
                raise ValueError(f"{', '.join(sorted(unread))}: not read")
            if missing := NEEDED - self.given.keys():
                raise ValueError(f"{', '.join(sorted(missing))}: missing")
            self.patterns = [re.compile(pattern) for pattern in self.given["regex_patterns"]]
            self.asking = Asking(int(self.given["max_tokens"]), float(self.given["temperature"]))
            self._conversation("question", "a", "b")
        except (OSError, yaml.YAMLError, re.error, AttributeError, LookupError, ValueError, TypeError) as error:
            raise UserError(
                f"{file}: is no config of an Arena-Hard judge ({one_line(error)}); it is config/arena-hard-v2.0.yaml "
                "with a system_prompt, which is copied from JUDGE_SETTINGS in utils/judge_utils.py"
            ) from error
        read = {key: self.given[key] for key in ("system_prompt", "prompt_template", "regex_patterns")}
        self.label = {"protocol": "Arena-Hard", "prompt": digest(read)}

    def check(self, prompts: list[Prompt]) -> None:
        """All prompts can be judged."""

    def verdicts(self, case: Case, endpoint: Endpoint, store: Store) -> list[dict[str, Any]]:
        """Two games per prompt as Arena-Hard's files of judgments have them: the opponent is A in the first one."""
        games = [
            self._conversation(prompt.turns[0], *both)
            for prompt, ours, theirs in zip(case.prompts, case.first, case.theirs, strict=True)
            for both in ((theirs, ours), (ours, theirs))
        ]
        replies = ask(endpoint, games, {"judge": endpoint.model} | self.label, store)
        return [
            self.label
            | {
                "uid": prompt.id,
                "category": prompt.dataset,
                "model": MODEL,
                "games": [{"score": self.verdict(reply.text)} for reply in replies[2 * i : 2 * i + 2]],
                "version": ", ".join(dict.fromkeys(reply.version for reply in replies[2 * i : 2 * i + 2])),
            }
            for i, prompt in enumerate(case.prompts)
        ]

    def measures(self, verdicts: list[dict[str, Any]], case: Case) -> Measures:
        """The mean of both games by category; a strong verdict counts three times, as in its show_result.py."""
        if not verdicts:
            return {}
        versions = (row["version"] for row in verdicts)
        found = result_files.arena_hard(verdicts)[MODEL]
        return labelled(found, *versions, "Arena-Hard", f"prompt {self.label['prompt']}", f"against {case.opponent}")

    def verdict(self, text: str) -> str | None:
        """The last verdict of the first pattern that finds one; None if it is none that Arena-Hard counts."""
        for pattern in self.patterns:
            if found := [verdict for verdict in pattern.findall(text.upper()) if verdict]:
                last = found[-1].strip("\n")
                return last if last in result_files.ARENA_HARD else None
        return None

    def _conversation(self, *texts: str) -> Conversation:
        user = self.given["prompt_template"].format(**dict(zip(FIELDS, texts, strict=True)))
        return [{"role": "system", "content": self.given["system_prompt"]}, {"role": "user", "content": user}]
