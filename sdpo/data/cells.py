"""Values of a row that may be written as text: conversations, tools and settings of the chat template."""

import ast
import json
import re
from typing import Any

from sdpo.errors import UserError

# Turns, or OpenAI's input, as JSON or as Python writes them; with another key first, it must be a whole value.
STRUCTURE = re.compile(r"""\s*\[?\s*\{\s*['"](role|content|from|value|messages)['"]\s*:""")
OF_TURNS = ("role", "from", "messages")
CONVERSATIONS = (
    *("prompt", "question", "messages", "conversations", "input"),
    *("preferred_output", "non_preferred_output"),
)
# Of apply_chat_template, and of the template's own names: no row can set them.
RESERVED = frozenset(
    "messages conversation tools documents chat_template add_generation_prompt continue_final_message tokenize padding "
    "truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs "
    "sanitize_control_tokens bos_token eos_token".split()
)


class BadRow(UserError):
    """A row that cannot be used: the reason to count it by, the field at fault, and what is wrong with it."""

    def __init__(self, reason: str, field: str | None, problem: str):
        super().__init__(f"field '{field}' {problem}" if field else problem)
        self.reason = reason
        self.field = field
        self.problem = problem


def parse_row(row: Any) -> dict[str, Any]:
    """The row as a dictionary; readers leave lines of JSON as text. Raises BadRow."""
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except json.JSONDecodeError as error:
            raise BadRow("invalid_json", None, f"is not valid JSON ({error.msg})") from None
    if not isinstance(row, dict):
        raise BadRow("invalid_json", None, "is not a JSON object")
    return row


def parse_cells(row: dict[str, Any]) -> dict[str, Any]:
    """The row with conversations that are written as text (in CSV, in JSON in a text column) read. Raises BadRow.

    The answers are read only if both of them are conversations: one of them alone is an answer about a conversation.
    """
    answers = [column for column in ("chosen", "rejected") if _is_structure(row.get(column))]
    columns = [column for column in CONVERSATIONS if _is_structure(row.get(column))]
    columns += answers if len(answers) == 2 else []
    return row | {column: _parse(row[column], column) for column in columns}


def template_inputs(row: dict[str, Any]) -> dict[str, Any]:
    """What the chat template reads beside the turns: tools, and the settings in chat_template_kwargs. Raises BadRow."""
    nested = row["input"].get("tools") if isinstance(row.get("input"), dict) else None
    tools = structure(row.get("tools") or nested or [], "tools", list)
    settings = structure(row.get("chat_template_kwargs") or {}, "chat_template_kwargs", dict)
    if not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("tools", "tools", "is not a list of JSON objects")
    if taken := sorted(RESERVED & settings.keys()):
        raise BadRow("chat_template_kwargs", "chat_template_kwargs", f"sets {taken[0]}, which no row can set")
    said = {name: value for name, value in _pruned(settings).items() if value not in ("", [], {})}
    inputs = said | ({"tools": _pruned(tools)} if tools else {})
    if not is_utf8(json.dumps(inputs, ensure_ascii=False, default=str)):
        raise BadRow("invalid_utf8", "tools" if tools else "chat_template_kwargs", "is not valid UTF-8")
    return inputs


def is_utf8(text: str) -> bool:
    """Whether a text can be written: readers leave invalid bytes, and JSON's lone surrogates, as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_structure(value: Any) -> bool:
    return isinstance(value, str) and (STRUCTURE.match(value) is not None or _holds_turns(value))


def _holds_turns(text: str) -> bool:
    """Whether a text is, as a whole, an object or a list of objects that have a key of turns."""
    if not text.lstrip().startswith(("{", "[")) or not any(key in text for key in OF_TURNS):
        return False
    try:
        value = _parse(text, "")
    except BadRow:
        return False
    items = value if isinstance(value, list) else [value]
    return any(isinstance(item, dict) and any(key in item for key in OF_TURNS) for item in items)


def structure(value: Any, field: str, kind: type) -> Any:
    """A list or dictionary, which may be written as text. Raises BadRow."""
    value = _parse(value, field, reason=field) if isinstance(value, str) else value
    if not isinstance(value, kind):
        raise BadRow(field, field, f"is {type(value).__name__}, not a JSON {'list' if kind is list else 'object'}")
    return value


def _parse(text: str, field: str, reason: str = "bad_conversation") -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError):
            continue
    raise BadRow(reason, field, "is written as text, but is neither valid JSON nor a Python value")


def _pruned(value: Any) -> Any:
    """Without the nulls that a parquet file writes for keys that other rows have."""
    if isinstance(value, dict):
        return {key: _pruned(inner) for key, inner in value.items() if inner is not None}
    return [_pruned(inner) for inner in value] if isinstance(value, list) else value
