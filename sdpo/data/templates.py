"""Chat templates: how a tokenizer and a template write a conversation as text."""

import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import cache
from os.path import commonprefix
from types import MappingProxyType
from typing import Any, cast

from jinja2 import Environment, TemplateError, meta
from transformers import PreTrainedTokenizerBase

from sdpo.config import Data
from sdpo.data.schemas import Message
from sdpo.errors import UserError

TEMPLATES = {
    "alpaca": (
        "{% if messages[0]['role'] != 'system' %}{{ 'Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.' }}{% endif %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ '\n\n### Instruction:\n' + message['content'] }}"
        "{% elif message['role'] == 'assistant' %}{{ '\n\n### Response:\n' + message['content'] ~ eos_token }}"
        "{% else %}{{ message['content'] }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '\n\n### Response:\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>\n' + message['content'] ~ eos_token ~ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "plain": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
}
REASONING = ("<think>", "</think>")  # part of an answer if the template reads or writes them
MARK = re.compile(r"[<\[{].*[>\]}]", re.DOTALL)  # how the marks of templates look: <|im_end|>, </s>, [INST]
GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # tags of transformers, which Jinja does not know
CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
# What a Jinja template raises on messages that it does not expect.
FAILURES = (TemplateError, LookupError, TypeError, ValueError, AttributeError)
RULES = Message(role="system", content="Rules, to be kept.")
QUESTION = Message(role="user", content="What is asked here?")
ANSWERS = ("First this.", "another, second!")  # without a common beginning or end
NO_INPUTS: Mapping[str, Any] = MappingProxyType({})


def chat_template(tokenizer: PreTrainedTokenizerBase, name: str | None, tools: list | None = None) -> str:
    """The Jinja text of a named template; for None of the tokenizer's own, which may have one more for tools.

    Raises UserError if there is no such template.
    """
    names = ", ".join(TEMPLATES)
    if name is None and not tokenizer.chat_template:
        raise UserError(f"the tokenizer has no chat template; set data.template to one of {names}")
    if name is not None and name not in TEMPLATES:
        raise UserError(f"data.template={name} is none of {names}")
    return tokenizer.get_chat_template(tools=tools) if name is None else TEMPLATES[name]


def any_of(marks: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds each of the marks, and where several of them begin the longest one."""
    return re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))) or r"(?!)")


@cache
def _variables(template: str) -> set[str]:
    """The names that a template reads from outside, apart from those of its own variables and of parts of messages."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    return meta.find_undeclared_variables(environment.parse(GENERATION.sub("", template)))


class Writer:
    """Writes conversations as text, and makes the marks in their words harmless first.

    `date` (ISO) is what templates are told to be the day on which they are rendered, so that the same conversation
    has the same tokens tomorrow. `ending` is what the template writes behind a last answer; `writes_system` says
    whether it writes system turns. Raises UserError for a template that does not exist or leaves words out, and for an
    invalid date.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None, date: str = Data.template_date):
        self.tokenizer = tokenizer
        self._named = template
        source = chat_template(tokenizer, template)
        try:
            self._now = datetime.fromisoformat(date)
        except ValueError as error:
            raise UserError(f"data.template_date={date} is not a date; write it as {Data.template_date}") from error
        if "strftime_now(" in CLOCK.sub("", source):
            raise UserError("the chat template reads the clock in a way that data.template_date cannot set")
        first, second = (self._try_on_text(answer) for answer in ANSWERS)
        self.ending = commonprefix([first[::-1], second[::-1]])[::-1]
        with_system = self._write_if_accepted([RULES, QUESTION])
        self.writes_system = RULES["content"] in with_system
        self._marks = any_of(self._find_marks(source, first + with_system))

    def write(self, turns: Iterable[Mapping], invite: bool = False, inputs: Mapping[str, Any] = NO_INPUTS) -> str:
        """The conversation as the template writes it, followed by the invitation to answer if `invite`.

        `inputs` are what the template reads beside the turns: tools, and switches such as enable_thinking.
        Raises UserError if the template fails or does not read an input.
        """
        template = self.template(inputs.get("tools"))
        if unread := [name for name in inputs if name not in _variables(template)]:
            raise UserError(f"the chat template does not read {unread[0]}, which the row has")
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(turn) for turn in turns],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=invite,
                **inputs,
            )
        except FAILURES as error:
            raise UserError(f"the chat template fails ({error})") from error
        return cast(str, text)

    def template(self, tools: list | None = None) -> str:
        """The Jinja text of the template, in which the clock stands still: transformers takes none from outside."""
        template = chat_template(self.tokenizer, self._named, tools)
        return CLOCK.sub(lambda reading: repr(self._now.strftime(reading[2])), template)

    def harmless(self, value: Any) -> tuple[Any, int]:
        """Text, or lists and dictionaries of text, keys too, without special tokens, and how many were removed."""
        if isinstance(value, str):
            return self._without_marks(value)
        if isinstance(value, Mapping):
            parts, removed = self.harmless([*value, *value.values()])
            return dict(zip(parts[: len(value)], parts[len(value) :], strict=True)), removed
        if isinstance(value, list | tuple):
            parts = [self.harmless(part) for part in value]
            return [part for part, _ in parts], sum(removed for _, removed in parts)
        return value, 0

    def _try_on_text(self, answer: str) -> str:
        """A conversation of one turn. Raises UserError if the template leaves a part of it out."""
        try:
            text = self.write([QUESTION, Message(role="assistant", content=answer)])
            if answer in text and QUESTION["content"] in text:
                return text
            problem = "the chat template leaves out what the user or the assistant says"
        except UserError as error:
            problem = str(error)
        if self._reads_parts():
            problem = "the chat template reads messages as lists of pictures and text, not as text"
        raise UserError(f"{problem}; set data.template to one of {', '.join(TEMPLATES)}")

    def _write_if_accepted(self, turns: Iterable[Mapping]) -> str:
        """The conversation; "" if the template refuses it."""
        try:
            return self.write(turns)
        except UserError:
            return ""

    def _reads_parts(self) -> bool:
        """Whether the template is one of a model that sees: it reads a message as a list of its parts."""
        words = QUESTION["content"]
        text = self._write_if_accepted([{"role": "user", "content": [{"type": "text", "text": words}]}])
        return words in text and "'type'" not in text

    def _find_marks(self, source: str, example: str) -> list[str]:
        """All special tokens, and the added tokens with which the template divides a conversation."""
        added = self.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        dividing = {token.content for token in added if MARK.fullmatch(token.content) and token.content in example}
        marks = (special | dividing) - {mark for mark in REASONING if mark in source}
        return [mark for mark in marks if mark.strip()]

    def _without_marks(self, text: str) -> tuple[str, int]:
        """What is removed may leave another mark behind, <|im_<s>end|>, so this goes on until nothing is found."""
        removed = 0
        while self._marks.search(text):
            text, num = self._marks.subn("", text)
            removed += num
        return text, removed
