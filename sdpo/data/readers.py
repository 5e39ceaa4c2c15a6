"""Files and Hub data sets -> tables of raw rows. Nothing here knows what a pair is."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

Numbered = Iterator[tuple[int, Any]]  # counted from 1; a row, or a line of JSON that is still to be parsed


class Unreachable(ValueError):
    """What is neither on this machine nor can be loaded from the Hub."""

    def __init__(self, name: str, reason: Exception):
        super().__init__(f"{name}: cannot be loaded from the Hub ({' '.join(str(reason).split())})")
        self.name = name


class Table(NamedTuple):
    name: str  # as the user wrote it
    source: str
    sha256: str  # of the file's bytes, or of a data set's rows
    rows: list[tuple[int, Any]]


def read_file(name: str) -> Table:
    """A .jsonl, .json, .parquet or .csv file; its source is the file name up to the first dot.

    Invalid UTF-8 is kept as lone surrogates, so that the check of a row can name the field that holds it.
    Raises ValueError for a file that cannot be read as a whole.
    """
    path = Path(name)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{name}: files of this kind are not read; use one of {', '.join(READERS)}")
    try:
        content = path.read_bytes()
        rows = list(reader(content))
    except OSError as error:
        raise ValueError(f"{name}: cannot be read ({error.strerror or error})") from error
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{name}: is not a valid {path.suffix} file ({error})") from error
    return Table(name, source_of_file(name), hashlib.sha256(content).hexdigest(), rows)


def read_hub(name: str, revisions: dict[str, str]) -> Table:
    """A data set `owner/name`, `owner/name:split` or `owner/name/config:split`.

    The split is `train` unless named; `revisions` maps `owner/name` to a branch, tag or commit. Raises Unreachable,
    a ValueError, where the data set cannot be loaded.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    path, _, split = name.partition(":")
    repository, config = "/".join(path.split("/")[:2]), "/".join(path.split("/")[2:])
    revision = revisions.get(repository)
    try:
        rows = load_dataset(repository, config or None, split=split or "train", revision=revision).to_list()
    except (OSError, ValueError, DatasetsError) as error:
        raise Unreachable(name, error) from error
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return Table(name, source_on_hub(name), digest.hexdigest(), list(enumerate(rows, 1)))


def source_of_file(name: str) -> str:
    """The source that a file is: its name up to the first dot."""
    return Path(name).name.split(".")[0]


def source_on_hub(name: str) -> str:
    """The source that a data set is: its name without owner and split."""
    path = name.partition(":")[0]
    return "-".join(path.split("/")[1:]) or path


def _text(content: bytes) -> str:
    return content.decode("utf-8-sig", errors="surrogateescape")


def _json_lines(content: bytes) -> Numbered:
    lines = enumerate(_text(content).split("\n"), 1)
    return ((number, line) for number, line in lines if line.strip())


def _json(content: bytes) -> Numbered:
    text = _text(content)
    return enumerate(json.loads(text), 1) if text.lstrip().startswith("[") else _json_lines(content)


def _csv(content: bytes) -> Numbered:
    return enumerate(csv.DictReader(io.StringIO(_text(content), newline=""), restkey="(no header)"), 1)


def _parquet(content: bytes) -> Numbered:
    from pyarrow import BufferReader, parquet

    return enumerate(parquet.read_table(BufferReader(content)).to_pylist(), 1)


READERS = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet, ".csv": _csv}
