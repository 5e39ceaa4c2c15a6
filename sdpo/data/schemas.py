"""Rows as users have them -> prompt turns, chosen, rejected. Layouts are told apart by their columns."""

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple, TypedDict

from sdpo.data.cells import BadRow, is_utf8, parse_cells, template_inputs

Row = dict[str, Any]

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
RATINGS = {  # ours, argilla's, UltraFeedback's
    "chosen": ("chosen_rating", "chosen-rating", "score_chosen"),
    "rejected": ("rejected_rating", "rejected-rating", "score_rejected"),
}
# Layouts with the prompt in a column of its own: that column -> the layout's name. `messages` is ours.
PROMPT_COLUMNS = {"messages": "messages", "conversations": "sharegpt", "question": "orca", "prompt": "plain"}
# What a text cannot hold, or what is not written as text here.
UNSUPPORTED_COLUMNS = ("images", "image", "videos", "audio", "tool_calls", "reasoning_content")
UNSUPPORTED_IN_TURNS = (
    *UNSUPPORTED_COLUMNS,
    *("name", "tools", "functions", "function_call", "function_calls", "tool_call_id", "tool_plan", "documents"),
    *("citations", "reasoning", "reasoning_details", "thinking", "thought", "thoughts"),
)
READ_IN_TURNS = {"role", "content", "from", "value"}
ANSWERS = ("chosen", "rejected")
OPENAI = ("input", "preferred_output", "non_preferred_output")
READ_IN_ALL_LAYOUTS = {  # or refused
    *("id", "source", "system", "tools", "chat_template_kwargs", "pair_score"),
    *UNSUPPORTED_COLUMNS,
    *(name for names in RATINGS.values() for name in names),
}
TRANSCRIPT = re.compile(r"\s*Human:.*\n\nAssistant:|\n\nHuman:", re.DOTALL)  # how Anthropic/hh-rlhf writes prompts
WHOLE_TRANSCRIPT = re.compile(r"\s*Human:.*\n\nAssistant:", re.DOTALL)
WORDS_NOT_REPEATED_BY_CHANCE = 5


class Message(TypedDict):
    role: str  # system | user | assistant
    content: str


Turns = tuple[Message, ...]


class Normal(NamedTuple):
    layout: str
    prompt: Turns
    chosen: str
    rejected: str
    chosen_rating: float | None
    rejected_rating: float | None
    inputs: dict[str, Any]  # what the chat template reads beside the turns
    pair_score: float | None  # how easy the pair is, for score=column
    unread: set[str]  # columns that nothing reads, and that say more than the turns that were read


def normalise(row: Row) -> Normal:
    """A row of any known layout, checked. Raises BadRow."""
    row = parse_cells({column: value for column, value in row.items() if value is not None})
    for column in UNSUPPORTED_COLUMNS:
        if row.get(column):
            raise BadRow(column, column, "is not supported; data.columns can name the columns to read")
    layout, columns, prompt, chosen, rejected = _read(row)
    if row.get("system"):
        prompt = _with_system(prompt, check_text(row["system"], "system"))
    if prompt[-1]["role"] != "user":
        raise BadRow("bad_conversation", "prompt", f"ends with the role {prompt[-1]['role']}, not with user")
    check_text(chosen, "chosen")
    check_text(rejected, "rejected")
    if chosen == rejected:
        raise BadRow("identical", "rejected", "equals 'chosen', so the pair states no preference")
    score = first_number(row, ["pair_score"])
    ratings = first_number(row, RATINGS["chosen"]), first_number(row, RATINGS["rejected"])
    said = {"", chosen.strip(), rejected.strip(), *(turn["content"].strip() for turn in prompt)}
    rest = row.keys() - READ_IN_ALL_LAYOUTS - set(columns)
    unread = {str(column) for column in rest if not _texts(row[column]) <= said}
    unread |= {f"{column}[].{key}" for column in columns for key in _unread_keys(row[column])}
    return Normal(layout, prompt, chosen, rejected, *ratings, template_inputs(row), score, unread)


def rename(row: Row, columns: dict[str, str]) -> Row:
    """The row under our names (`columns`: ours -> theirs); other columns are not read. Raises BadRow."""
    for theirs in columns.values():
        if theirs not in row:
            raise BadRow("missing_column", theirs, f"does not exist; the row has {', '.join(row)}")
    return {ours: row[theirs] for ours, theirs in columns.items()}


def check_text(value: Any, field: str) -> str:
    """The value, if it is text, not blank, and valid UTF-8. Raises BadRow."""
    if value is None:
        raise BadRow("missing_column", field, "is missing or null")
    if not isinstance(value, str):
        raise BadRow("not_text", field, f"is {type(value).__name__}, not text")
    if not value.strip():
        raise BadRow("empty", field, "is empty")
    if not is_utf8(value):
        raise BadRow("invalid_utf8", field, "is not valid UTF-8")
    return value


def check_id(value: Any) -> str:
    """The id of a row, as text. Raises BadRow."""
    return check_text(str(value) if isinstance(value, int) else value, "id")


def _texts(value: Any) -> set[str]:
    """The texts of a cell that holds turns, or one text; anything else as Python writes it."""
    turns = value if isinstance(value, list) else [value]
    contents = (_first(turn, "content", "value") if isinstance(turn, dict) else turn for turn in turns)
    return {content.strip() if isinstance(content, str) else repr(content) for content in contents}


def _unread_keys(value: Any) -> set[str]:
    """The keys with a value that nothing reads in the turns of a cell."""
    value = value.get("messages", value) if isinstance(value, dict) else value
    turns = [turn for turn in (value if isinstance(value, list) else [value]) if isinstance(turn, dict)]
    return {str(key) for turn in turns for key in turn.keys() - READ_IN_TURNS if turn[key]}


def _read(row: Row) -> tuple[str, tuple[str, ...], Turns, Any, Any]:
    """The layout's name and columns, the prompt, chosen and rejected."""
    if set(OPENAI) <= row.keys():
        return "openai", OPENAI, *_openai(row)
    for column in ANSWERS:
        if column not in row:
            raise _missing(column, row)
    if isinstance(row["chosen"], list | dict):
        return "conversation", ANSWERS, *_conversation(row)
    row = {column: _with_unix_lines(value) for column, value in row.items()}
    for column, layout in PROMPT_COLUMNS.items():
        if column in row:
            if isinstance(row[column], str) and TRANSCRIPT.match(row[column]):
                return "transcript", (*ANSWERS, column), *_transcript(_complete(row, column))
            if all(WHOLE_TRANSCRIPT.match(str(row[side])) for side in ANSWERS):
                return "transcript", ANSWERS, *_transcript({side: "\n\n" + row[side].strip() for side in ANSWERS})
            chosen, rejected, repeated = _without_prompt(row, column)
            return layout + repeated, (*ANSWERS, column), _prompt(row[column], column), chosen, rejected
    if "\n\nAssistant:" in str(row["chosen"]):
        return "transcript", ANSWERS, *_transcript(row)
    raise _missing("prompt", row)


def _openai(row: Row):
    """OpenAI's preference fine-tuning: input.messages, preferred_output, non_preferred_output."""
    given = row["input"]
    if not isinstance(given, dict) or "messages" not in given:
        raise BadRow("missing_column", "input", "has no 'messages'")
    fields = ("preferred_output", "non_preferred_output")
    answers = (_answer(_turns(row[field], field), field) for field in fields)
    return _turns(given["messages"], "input.messages"), *answers


def _conversation(row: Row):
    """UltraFeedback, argilla: chosen and rejected are turns, whole conversations or answers to a prompt."""
    chosen, rejected = (_turns(row[field], field) for field in ("chosen", "rejected"))
    prompt = chosen[:-1]
    if prompt != rejected[:-1]:
        raise BadRow("prompt_mismatch", "rejected", "differs from 'chosen' before the last turn")
    given = next((column for column in ("prompt", *PROMPT_COLUMNS) if column in row), None)
    if not prompt:
        if given is None:
            raise _missing("prompt", row)
        prompt = _prompt(row[given], given)
    elif given == "prompt" and isinstance(row[given], list) and _turns(row[given], given) != prompt:
        raise BadRow("prompt_mismatch", "chosen", "does not begin with the turns of 'prompt'")
    return prompt, _answer(chosen[-1:], "chosen"), _answer(rejected[-1:], "rejected")


def _with_system(prompt: Turns, rules: str) -> Turns:
    if prompt[0]["role"] != "system":
        return (Message(role="system", content=rules), *prompt)
    if prompt[0]["content"].strip() != rules.strip():
        raise BadRow("two_systems", "system", "differs from the system turn that the conversation begins with")
    return prompt


def _without_prompt(row: Row, column: str) -> tuple[Any, Any, str]:
    """Chosen and rejected without the prompt that both of them repeat, and what to add to the layout's name.

    A prompt of a few words may well be the beginning of both answers, so it is left there.
    """
    prompt, answers = row[column], (row["chosen"], row["rejected"])
    texts = isinstance(prompt, str) and len(prompt.split()) >= WORDS_NOT_REPEATED_BY_CHANCE
    if not texts or not all(isinstance(answer, str) and answer.startswith(prompt) for answer in answers):
        return *answers, ""
    chosen, rejected = (answer.removeprefix(prompt).lstrip() for answer in answers)
    return chosen, rejected, ", prompt repeated"


def _complete(row: Row, column: str) -> Row:
    """The whole transcripts of a row whose prompt is a transcript; its answers may or may not repeat the prompt."""
    head = "\n\n" + row[column].strip().removesuffix("Assistant:").rstrip()
    whole = {}
    for side in ("chosen", "rejected"):
        answer = check_text(row[side], side).strip().removeprefix("Assistant:").strip()
        whole[side] = "\n\n" + answer if ("\n\n" + answer).startswith(head) else f"{head}\n\nAssistant: {answer}"
    return whole


def _with_unix_lines(value: Any) -> Any:
    """A transcript whose lines end with \\r\\n, as some CSV files have it, with \\n; anything else as it is."""
    windows = isinstance(value, str) and re.search(r"\r\n\r\n(Human|Assistant):", value)
    return value.replace("\r\n", "\n") if windows else value


def _transcript(row: Row):
    """Anthropic/hh-rlhf: two transcripts that differ after the last "Assistant:"."""
    prompt, chosen = _split_transcript(row["chosen"], "chosen")
    other, rejected = _split_transcript(row["rejected"], "rejected")
    if prompt != other:
        raise BadRow("prompt_mismatch", "rejected", "differs from 'chosen' before the last 'Assistant:'")
    opening, *parts = re.split(r"\n\n(Human|Assistant):", prompt)
    if opening.strip() or not parts:
        raise BadRow("bad_conversation", "chosen", "does not begin with 'Human:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]
    return _turns(turns, "chosen"), chosen, rejected


def _split_transcript(text: Any, field: str) -> tuple[str, str]:
    prompt, marker, answer = check_text(text, field).rpartition("\n\nAssistant:")
    if not marker or "\n\nHuman:" in answer:
        raise BadRow("bad_conversation", field, "does not end with a turn of 'Assistant:'")
    return prompt, answer.strip()


def _prompt(value: Any, field: str) -> Turns:
    if isinstance(value, list):
        return _turns(value, field)
    return (Message(role="user", content=check_text(value, field)),)


def _turns(value: Any, field: str) -> Turns:
    """Turns as {role, content} or {from, value}, in a list or a single one; empty system turns are left out."""
    turns = []
    for number, turn in enumerate([value] if isinstance(value, dict) else value if isinstance(value, list) else []):
        if not isinstance(turn, dict):
            raise BadRow("bad_conversation", field, f"holds {type(turn).__name__}, not messages")
        role, content = (_first(turn, *names) for names in (("role", "from"), ("content", "value")))
        if not isinstance(role, str) or role not in ROLES:
            raise BadRow("bad_conversation", field, f"has the role {role!r}; known are {', '.join(ROLES)}")
        for key in UNSUPPORTED_IN_TURNS:
            if turn.get(key):
                raise BadRow(key, f"{field}[{number}].{key}", "is not supported; only the text of a turn is read")
        if role != "system" or content:
            turns.append(Message(role=ROLES[role], content=check_text(content, f"{field}[{number}].content")))
    if not turns:
        raise BadRow("empty" if isinstance(value, list) else "bad_conversation", field, "holds no messages")
    return tuple(turns)


def _first(turn: Row, *names: str) -> Any:
    """The first value that is not null: parquet files write null for the keys of other layouts."""
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def _answer(turns: Turns, field: str) -> str:
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise BadRow("bad_conversation", field, "does not end with one answer of the assistant")
    return turns[0]["content"]


def first_number(row: Row, columns: Iterable[str]) -> float | None:
    """The number in the first of the columns that the row has; None if it has none. Raises BadRow."""
    for column in columns:
        if row.get(column, "") not in ("", None):
            try:
                number = float(row[column])
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise BadRow("bad_rating", column, f"is {row[column]!r}, not a number")
            return number
    return None


def _missing(column: str, row: Row) -> BadRow:
    problem = f"is missing or null; the row has {', '.join(row)} (data.columns maps other names)"
    return BadRow("missing_column", column, problem)
