"""Where a prompt ends and where an answer stops in the text that a chat template writes."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from sdpo.config import Data
from sdpo.data.cells import BadRow
from sdpo.data.preferences import Pair
from sdpo.data.schemas import Message, Turns
from sdpo.data.templates import ANSWERS, MARK, NO_INPUTS, QUESTION, REASONING, TEMPLATES, Writer, any_of, chat_template
from sdpo.errors import UserError


class Texts(NamedTuple):
    prompt: str  # with what invites the assistant to answer
    chosen: str  # what follows the prompt, up to the stop token
    rejected: str  # "" in a demonstration
    counts: Counter[str]  # of specials_removed, answers_behind_prompt and answers_cut


class ChatFormat:
    """How one tokenizer and template write a prompt and its answer. Raises UserError for an unusable template.

    `bos` is the id of BOS, or None. A tokenizer's own template writes BOS itself; the named ones do not, and `adds_bos`
    says whether the tokenizer then puts it first. `stop` is the id that ends an answer: the first special token that
    the template writes behind it, else EOS. `stop_text` is that token's text, "" if the template writes none.
    `further_stops` are the `named_stops`, those of S's generation config, that are neither `stop` nor EOS.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None,
        date: str = Data.template_date,
        named_stops: Sequence[int] = (),
    ):
        self.tokenizer = tokenizer
        self.writer = Writer(tokenizer, template, date)
        self.bos = tokenizer.bos_token_id
        self.adds_bos = template is not None and tokenizer("").input_ids[:1] == [self.bos]
        self.stop, self.stop_text = self._find_stop()
        self.further_stops = [id for id in named_stops if id not in (self.stop, tokenizer.eos_token_id)]
        self._ending = self.writer.ending[self.writer.ending.index(self.stop_text) if self.stop_text else 0 :]
        body = self._body((QUESTION,), self.prompt((QUESTION,)), ANSWERS[0], Counter())
        self._around_answer = _words(body).replace(_words(ANSWERS[0]), "")

    @property
    def stops(self) -> list[int]:
        """The ids at which the model is to stop: the stop token, EOS, and the further ones."""
        stops = (self.stop, self.tokenizer.eos_token_id, *self.further_stops)
        return [id for id in dict.fromkeys(stops) if id is not None]

    @property
    def replaced_ending(self) -> str:
        """What the template writes behind an answer, if none of it is a token, so that EOS ends the answer instead."""
        return "" if self.stop_text else self.writer.ending.strip()

    def prompt(self, turns: Iterable[Message]) -> str:
        """A conversation in which the assistant is to speak next. Raises UserError if the template fails."""
        return self.writer.write(self.writer.harmless(tuple(turns))[0], invite=True)

    def texts(self, pair: Pair) -> Texts:
        """The pair as text. Raises BadRow if the template cannot write it, or nothing is left of a turn."""
        counts: Counter[str] = Counter()
        parts = (pair.prompt, pair.inputs, pair.chosen, pair.rejected)
        turns, inputs, *answers = (self._harmless(part, counts) for part in parts)
        if not self.writer.writes_system and any(turn["role"] == "system" for turn in turns):
            raise BadRow("template", "prompt", "has a system turn, which the chat template does not write")
        if not all(turn["content"].strip() for turn in turns):
            raise BadRow("empty", "prompt", "has a turn of nothing but special tokens")
        try:
            prompt = self.writer.write(turns, invite=True, inputs=inputs)
            if lost := [i for i in range(len(turns)) if self._is_left_out(turns, i, prompt, inputs)]:
                raise UserError(f"the chat template leaves out turn {lost[0] + 1}, of the {turns[lost[0]]['role']}")
            chosen, rejected = (self._body(turns, prompt, answer, counts, inputs) for answer in answers)
        except UserError as error:
            raise BadRow("template", None, str(error)) from error
        for field, body in (("chosen", chosen), ("rejected", rejected)):
            if getattr(pair, field) and _words(body) in ("", self._around_answer):
                raise BadRow("empty", field, "is left with nothing by the chat template and without special tokens")
        return Texts(prompt, chosen, rejected, counts)

    def _is_left_out(self, turns: Turns, number: int, prompt: str, inputs: Mapping[str, Any]) -> bool:
        """Whether a turn of the system or the user is not in the prompt, and the prompt is the same without it.

        A template may replace words that switch something, such as /no_think. Of earlier answers it may leave out
        thoughts.
        """
        turn = turns[number]
        if turn["role"] == "assistant" or _words(turn["content"]) in _words(prompt):
            return False
        try:
            return self.writer.write([*turns[:number], *turns[number + 1 :]], invite=True, inputs=inputs) == prompt
        except UserError:
            return False

    def _harmless(self, value: Any, counts: Counter[str]) -> Any:
        value, removed = self.writer.harmless(value)
        counts["specials_removed"] += removed
        return value

    def _body(
        self, turns: Turns, prompt: str, answer: str, counts: Counter[str], inputs: Mapping[str, Any] = NO_INPUTS
    ) -> str:
        """What follows the prompt up to the stop token, as the template writes it.

        A template may begin the whole conversation in another way than the prompt, for example if its invitation
        opens a chain of thought. Then the body is the answer itself.
        """
        if not answer:
            return ""
        whole = self.writer.write([*turns, Message(role="assistant", content=answer)], inputs=inputs)
        body = whole.removeprefix(prompt).removesuffix(self._ending)
        if prompt + body + self._ending != whole:
            counts["answers_behind_prompt"] += 1
            return answer
        counts["answers_cut"] += _words(answer) not in _words(body)
        return body

    def _find_stop(self) -> tuple[int, str]:
        """The stop token and its text."""
        unknown, eos = self.tokenizer.unk_token_id, self.tokenizer.eos_token_id
        marks = {
            token.content: id
            for id, token in self.tokenizer.added_tokens_decoder.items()
            if id != unknown and (token.special or MARK.fullmatch(token.content))
        }
        if found := any_of(filter(str.strip, marks)).search(self.writer.ending):
            return marks[found[0]], found[0]
        if eos is None:
            raise UserError("the tokenizer has no EOS token and its template ends an answer with no special token")
        return eos, ""


def as_trained(tokenizer: PreTrainedTokenizerBase, template: str | None) -> PreTrainedTokenizerBase:
    """A tokenizer that carries how a model was trained to talk.

    Its own chat template writes prompts with the ids of the training, including BOS. Its EOS is the stop token, unless
    the template writes EOS itself.
    """
    chat, carrying = ChatFormat(tokenizer, template), deepcopy(tokenizer)
    if template is not None:
        begins_with_bos = chat.adds_bos and not chat.prompt((QUESTION,)).startswith(tokenizer.bos_token)
        carrying.chat_template = "{{ bos_token }}" * begins_with_bos + TEMPLATES[template]
    if chat.stop_text and "eos_token" not in chat_template(carrying, None):
        carrying.eos_token = chat.stop_text
    return carrying


def _words(text: str) -> str:
    """The text without white space and marks of reasoning, which templates move."""
    for mark in REASONING:
        text = text.replace(mark, "")
    return "".join(text.split())
