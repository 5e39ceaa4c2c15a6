"""Prompts: files with one a line, rows as AlpacaEval 2 and MT-Bench have them, or those of preference pairs."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sdpo.data.cells import BadRow, is_utf8, parse_cells, parse_row, structure
from sdpo.data.preferences import Pair
from sdpo.data.readers import READERS, Table, read_file, read_hub
from sdpo.data.schemas import Message, Turns
from sdpo.errors import UserError

ID_COLUMNS = ("question_id", "uid", "id")
PROMPT_COLUMNS = ("instruction", "prompt", "turns")
# Parts of a prompt in other layouts.
UNREAD = ("input", "system", "system_prompt", "messages", "history", "tools", "chat_template_kwargs")


class Prompt(NamedTuple):
    id: int | str
    turns: list[str]  # what a user says, one after the other; the model answers each
    dataset: str  # where it comes from, as AlpacaEval names it, or its category, as MT-Bench does
    before: Turns = ()  # the conversation before the first of `turns`

    def opening(self) -> Turns:
        """The conversation that the first answer follows."""
        return (*self.before, Message(role="user", content=self.turns[0]))

    def determinants(self) -> tuple:
        """What it adds to a key: `before` only if it says something."""
        return self if self.before else self[:-1]


def read(name: str) -> list[Prompt]:
    """The prompts of a .txt file (one a line), or of a file or a data set of the Hub with one of PROMPT_COLUMNS.

    A prompt without an id has the number of its row, and one without a data set the name of the file. A line ends
    with \\n or \\r\\n and nothing else. Raises UserError, naming file and row, also for text in UNREAD.
    """
    path = Path(name)
    if path.suffix == ".txt":
        table = _lines(name)
    else:
        table = read_file(name) if path.suffix.lower() in READERS or path.is_file() else read_hub(name, {})
    prompts = [_prompt(table, number, row) for number, row in table.rows]
    if not prompts:
        raise UserError(f"{name} holds no prompt")
    if len({prompt.id for prompt in prompts}) < len(prompts):
        raise UserError(f"{name}: an id stands twice; give every prompt one of its own, or none")
    return prompts


def of_pairs(pairs: Iterable[Pair], per_source: int | None) -> list[Prompt]:
    """The last turns of the pairs' prompts, after what came before them; the first `per_source` of each source.

    None stands for all. Prompts with tools or settings of the template are left out.
    """
    prompts, taken = [], Counter[str]()
    for pair in pairs:
        if not pair.inputs and (per_source is None or taken[pair.source] < per_source):
            taken[pair.source] += 1
            *before, last = pair.prompt
            prompts.append(Prompt(pair.id, [last["content"]], pair.source, tuple(before)))
    return prompts


def _lines(name: str) -> Table:
    try:
        lines = Path(name).read_text(encoding="utf-8-sig").split("\n")  # in text mode \r\n is \n too
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: cannot be read ({error})") from error
    return Table(name, Path(name).stem, "", [(i, {"prompt": line}) for i, line in enumerate(lines, 1) if line.strip()])


def _prompt(table: Table, number: int, row: Any) -> Prompt:
    place = f"{table.name}, row {number}"
    try:
        row = parse_cells(parse_row(row))
        turns = row.get("turns")
        if isinstance(turns, str) and turns.lstrip().startswith("["):
            row["turns"] = structure(turns, "turns", list)
    except BadRow as bad:
        raise UserError(f"{place}: {bad}") from bad
    if unread := next((column for column in UNREAD if row.get(column)), None):
        raise UserError(f"{place}: the field '{unread}' is not read; write its text into the prompt")
    asked = next((row[column] for column in PROMPT_COLUMNS if column in row), None)
    asked = asked if isinstance(asked, list) else [asked]
    turns = [turn for turn in map(_said, asked) if isinstance(turn, str) and turn.strip() and is_utf8(turn)]
    if not turns or len(turns) < len(asked):
        raise UserError(f"{place}: has no text of a user in one of the fields {', '.join(PROMPT_COLUMNS)}")
    id = next((row[column] for column in ID_COLUMNS if column in row), number)
    return Prompt(id, turns, row.get("dataset", row.get("category", table.source)))


def _said(turn: Any) -> Any:
    """The text of a user's turn; anything else as it is."""
    is_user = isinstance(turn, dict) and turn.keys() <= {"role", "content"} and turn.get("role", "user") == "user"
    return turn.get("content") if is_user else turn
