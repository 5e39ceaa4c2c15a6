"""Preference pairs: read, normalised, held out, and accounted for."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any, NamedTuple

from sdpo import config
from sdpo.data.cells import BadRow, parse_row
from sdpo.data.readers import Table, named, read_file, read_hub, repository, sources
from sdpo.data.schemas import Message, check_id, check_text, normalise, rename
from sdpo.errors import UserError

# The names that data.columns can give to the columns of an unknown layout.
COLUMNS = (
    "id source system prompt messages chosen rejected chosen_rating rejected_rating pair_score tools "
    "chat_template_kwargs".split()
)


@dataclass(frozen=True, slots=True)
class Pair:
    id: str
    source: str
    prompt: tuple[Message, ...]  # the prompt turns; never empty
    chosen: str
    rejected: str  # "" only in demonstrations (supervised fine-tuning)
    chosen_rating: float | None = None
    rejected_rating: float | None = None
    inputs: dict[str, Any] = field(default_factory=dict)  # what the chat template reads beside the turns: tools, ...
    pair_score: float | None = None  # how easy the pair is, for score=column
    place: str = field(default="", compare=False, repr=False)  # file and row

    @property
    def called(self) -> str:
        """What messages call the pair: a user finds its row; an id made of its content stands in no file."""
        return self.place or f"pair {self.id} of source {self.source}"


class Preferences(NamedTuple):
    train: list[Pair]
    held_out: list[Pair]
    report: dict[str, Any]  # JSON: files, sources, dropped
    held_out_sets: Mapping[str, list[Pair]] = MappingProxyType({})  # further held-out pairs, by the name of their set


def load(settings: config.Data) -> Preferences:
    """The training and the held-out pairs of `data=local` or `data=hub`. No prompt is on both sides.

    Raises UserError for settings that contradict each other, and for the first bad row, naming file, row and
    field (with `on_bad_row=skip` bad rows are left out and reported).
    """
    _check(settings)
    intake = _Intake(settings)
    held_out = intake.read("held_out", settings.held_out)
    sets = {name: intake.read(f"held_out_sets.{name}", files) for name, files in settings.held_out_sets.items()}
    reserved = {prompt_key(pair.prompt): pair.id for pair in chain(held_out, *sets.values())}
    train = intake.read("train", settings.train, reserved)
    if not settings.held_out:
        train, held_out = hold_out(train, settings.held_out_share, settings.seed)
    if not train:
        raise UserError("no training pair is left; lower data.held_out_share or name more files in data.train")
    of_sets = {f"held_out_sets.{name}": describe(pairs) for name, pairs in sets.items()}
    report = {
        "files": intake.files,
        "sources": {"train": describe(train), "held_out": describe(held_out)} | of_sets,
        "dropped": _reasons(intake.dropped),
        "dropped_rows": intake.dropped,
    }
    return Preferences(train, held_out, report, sets)


def prompt_key(prompt: Iterable[Message]) -> str:
    """A short hash of the prompt turns: two pairs have equal keys exactly if they have the same prompt."""
    return _digest([[message["role"], message["content"]] for message in prompt])


def hold_out(pairs: list[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs, in order. A seeded share of the prompts is held out, at least one if share > 0."""
    keys = [prompt_key(pair.prompt) for pair in pairs]
    prompts = sorted(set(keys), key=lambda key: _digest([seed, key]))
    held = set(prompts[: max(round(share * len(prompts)), share > 0)])
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    for pair, key in zip(pairs, keys, strict=True):
        sides[key in held].append(pair)
    return sides


def describe(pairs: list[Pair]) -> dict[str, dict[str, Any]]:
    """Per source: counts, repeated pairs, mean lengths in characters, how often chosen is longer."""
    sources, contents = defaultdict(list), set()
    duplicates: Counter[str] = Counter()
    for pair in pairs:
        content = (prompt_key(pair.prompt), pair.chosen, pair.rejected)
        duplicates[pair.source] += content in contents
        contents.add(content)
        sources[pair.source].append(pair)
    return {
        source: {
            "pairs": len(rows),
            "prompts": len({prompt_key(pair.prompt) for pair in rows}),
            "duplicates": duplicates[source],
            "rated": sum(pair.chosen_rating is not None and pair.rejected_rating is not None for pair in rows),
            "prompt_chars": fmean(sum(len(turn["content"]) for turn in pair.prompt) for pair in rows),
            "chosen_chars": fmean(len(pair.chosen) for pair in rows),
            "rejected_chars": fmean(len(pair.rejected) for pair in rows),
            "chosen_longer": fmean(len(pair.chosen) > len(pair.rejected) for pair in rows),
        }
        for source, rows in sources.items()
    }


def write_jsonl(path: Path, pairs: Iterable[Pair]) -> None:
    """One pair a line, in this project's own layout."""
    with path.open("w", encoding="utf-8") as file:
        for pair in pairs:
            row = asdict(pair)
            row["messages"] = row.pop("prompt")
            del row["place"]
            for name in ("inputs", "pair_score"):
                if row[name] in (None, {}):
                    del row[name]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[Pair]:
    """The pairs that write_jsonl wrote, including demonstrations."""
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [Pair(prompt=tuple(row.pop("messages")), **row) for row in rows]


class _Intake:
    """Turns tables into pairs, and remembers which ids are taken and which rows were dropped."""

    def __init__(self, settings: config.Data):
        self.settings = settings
        self.taken: dict[str, str] = {}  # id -> the row that has it
        self.repeats: Counter[str] = Counter()  # of ids that are made from content
        self.files: list[dict] = []
        self.dropped: list[dict] = []
        self.unread: dict[str, set[str]] = defaultdict(set)  # file -> its columns with values that nothing reads

    def read(self, side: str, names: list[str], reserved: Mapping[str, str] | None = None) -> list[Pair]:
        """The pairs of the named tables; a prompt that is `reserved` (key -> id of its pair) is a bad row."""
        pairs = []
        limit = (side != "train" and self.settings.held_out_limit) or self.settings.limit
        for name, source in zip(names, sources(self.settings, names), strict=True):
            table = read_hub(name, self.settings.revisions) if self.settings.name == "hub" else read_file(name)
            rows = table.rows[: limit or None]
            pairs += self._read_table(side, table._replace(source=source, rows=rows), reserved or {})
        return pairs

    def _read_table(self, side: str, table: Table, reserved: Mapping[str, str]) -> list[Pair]:
        pairs, dropped = [], []
        layouts: Counter[str] = Counter()
        for number, row in table.rows:
            try:
                pair, layout = self._pair(table, number, row, reserved)
            except BadRow as bad:
                dropped.append(self._drop(table.name, number, bad))
            else:
                pairs.append(pair)
                layouts[layout] += 1
        if not pairs:
            why = f"; the first: {dropped[0]['problem']}" if dropped else ""
            raise UserError(f"{table.name}: none of its {len(dropped)} rows can be used{why}")
        self.dropped += dropped
        self.files.append(
            {
                "file": table.name,
                "side": side,
                "sha256": table.sha256,
                "rows": len(table.rows),
                "pairs": len(pairs),
                "layouts": dict(layouts),
                "unread_columns": sorted(self.unread[table.name]),
                "dropped": _reasons(dropped),
            }
        )
        return pairs

    def _pair(self, table: Table, number: int, row: Any, reserved: Mapping[str, str]) -> tuple[Pair, str]:
        row = parse_row(row)
        if self.settings.columns:
            self.unread[table.name] |= {str(name) for name in row.keys() - self.settings.columns.values() if row[name]}
            row = rename(row, self.settings.columns)
        normal = normalise(row)
        self.unread[table.name] |= normal.unread
        key = prompt_key(normal.prompt)
        if key in reserved:
            raise BadRow("held_out_prompt", "prompt", f"is held out too, in {self.taken[reserved[key]]}")
        source = check_text(row.get("source"), "source") if self.settings.source_from == "row" else table.source
        if row.get("id") is None:
            id = self._made_id(source, _digest([key, normal.chosen, normal.rejected]))
        else:
            id = check_id(row["id"])
        if id in self.taken:
            raise BadRow("duplicate_id", "id", f"{id!r} was used before, by {self.taken[id]}")
        self.taken[id] = place = f"{table.name}, row {number}"
        return Pair(id, source, *normal[1:-1], place=place), normal.layout

    def _made_id(self, source: str, digest: str) -> str:
        """An id made of the content, the same in every file and order; a pair that comes again gets a number too."""
        self.repeats[source + digest] += 1
        repeat = self.repeats[source + digest]
        return f"{source}-{digest}" + (f"-{repeat}" if repeat > 1 else "")

    def _drop(self, name: str, number: int, bad: BadRow) -> dict[str, Any]:
        field = bad.field and self.settings.columns.get(bad.field, bad.field)
        problem = f"field '{field}' {bad.problem}" if field else bad.problem
        if self.settings.on_bad_row == "error":
            raise UserError(f"{name}, row {number}: {problem}; repair it or set data.on_bad_row=skip") from bad
        return {"file": name, "row": number, "reason": bad.reason, "field": field, "problem": problem}


def _reasons(dropped: list[dict[str, Any]]) -> dict[str, int]:
    return dict(Counter(row["reason"] for row in dropped))


def _check_sources(settings: config.Data) -> None:
    """Raises UserError if two inputs would be taken for one source, and so for one step."""
    if settings.source_from == "row":
        return
    named: dict[str, str] = {}
    for name, source in zip(settings.train, sources(settings, settings.train), strict=True):
        if source in named:
            raise UserError(
                f"data.train: {named[source]} and {name} would both be the source {source!r}; rename one, or name the "
                "source of every row in a column and set data.source_from=row"
            )
        named[source] = name


def _check(settings: config.Data) -> None:
    """Raises UserError for settings that contradict each other, whatever the data are."""
    for name, files in settings.held_out_sets.items():
        if not files or "/" in name:
            raise UserError(f"data.held_out_sets.{name}: a set needs a name without '/' and at least one file")
    for side in (settings.train, settings.held_out, *settings.held_out_sets.values()):
        repeated = [name for name, times in Counter(side).items() if times > 1]
        if repeated:
            raise UserError(f"data names {repeated[0]} twice")
    _check_sources(settings)
    if unknown := settings.columns.keys() - set(COLUMNS):
        raise UserError(f"data.columns has {min(unknown)}; our columns are {', '.join(COLUMNS)}")
    if settings.columns and not {"chosen", "rejected"} <= settings.columns.keys():
        raise UserError("data.columns has to name every column that is read, chosen and rejected among them")
    repositories = set(map(repository, named(settings)))
    if settings.name == "hub" and (unknown := settings.revisions.keys() - repositories):
        raise UserError(f"data.revisions names {min(unknown)}, which is no data set of this run")


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
