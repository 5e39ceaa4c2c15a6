"""Files and Hub data sets -> tables of raw rows. Nothing here knows what a pair is."""

import csv
import hashlib
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from sdpo.config import Data
from sdpo.errors import Unreachable, UserError

SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves
Numbered = Iterator[tuple[int, Any]]  # counted from 1; a row, or a line of JSON that is still to be parsed


class Table(NamedTuple):
    name: str  # as the user wrote it
    source: str
    sha256: str  # of the file's bytes, or of a data set's rows
    rows: list[tuple[int, Any]]


def read_file(name: str) -> Table:
    """A .jsonl, .json, .parquet or .csv file; its source is the file name up to the first dot.

    Invalid bytes become lone surrogates, so that the check of a row can name the field that holds them.
    Raises UserError for a file that cannot be read as a whole.
    """
    path = Path(name)
    reader = READERS.get(path.suffix.lower())
    if path.is_dir():
        raise UserError(f"{name}: is a folder; read a data set's folder with data=hub, or name its files")
    if reader is None:
        raise UserError(f"{name}: files of this kind are not read; use one of {', '.join(READERS)}")
    try:
        content = path.read_bytes()
        rows = list(reader(content))
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror or error})") from error
    except (ValueError, csv.Error) as error:
        raise UserError(f"{name}: is not a valid {path.suffix} file ({error})") from error
    return Table(name, source_of_file(name), hashlib.sha256(content).hexdigest(), rows)


def read_hub(name: str, revisions: dict[str, str]) -> Table:
    """A data set `owner/name`, `owner/name:split` or `owner/name/config:split`, or a folder: `folder:split`.

    The split is `train` unless named; `revisions` maps `owner/name` to a branch, tag or commit. A folder holds files
    of data, or what `save_to_disk` wrote. Raises UserError if the data set cannot be loaded: Unreachable for the Hub.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    path, config, split = _parts(name)
    folder = Path(path).is_dir()
    if not folder and Path(path).is_absolute():
        raise UserError(f"{name}: there is no folder {path}")
    try:
        if folder and any((Path(path) / file).is_file() for file in SAVED):
            rows = _read_saved(name, path, split)
        else:
            rows = load_dataset(path, config, split=split, revision=revisions.get(path)).to_list()
    except (OSError, ValueError, DatasetsError) as error:
        if folder:
            raise UserError(f"{name}: cannot be read ({' '.join(str(error).split())})") from error
        raise Unreachable(name, error) from error
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return Table(name, source_on_hub(name), digest.hexdigest(), list(enumerate(rows, 1)))


def _read_saved(name: str, path: str, split: str) -> list[dict[str, Any]]:
    """The rows of what `save_to_disk` wrote: one data set, which counts as the split train, or several by split."""
    from datasets import Dataset, load_from_disk

    saved = load_from_disk(path)
    splits = {"train": saved} if isinstance(saved, Dataset) else saved
    if split not in splits:
        raise UserError(f"{name}: has no split {split}; it has {', '.join(splits)}")
    return splits[split].to_list()


def repository(name: str) -> str:
    """The repository or folder of a data set `owner/name/config:split`."""
    return _parts(name)[0]


def named(settings: Data) -> list[str]:
    """All files or data sets that a run reads."""
    return list(chain(settings.train, settings.held_out, *settings.held_out_sets.values()))


def on_hub(settings: Data) -> list[str]:
    """The names of the Hub's data sets that a run reads."""
    return named(settings) if settings.name == "hub" else []


def is_here(name: str, revisions: dict[str, str]) -> bool:
    """Whether a data set is in the Hub's cache; asks no network while HF_HUB_OFFLINE is set."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    path, config, _ = _parts(name)
    if Path(path).is_dir():
        return True
    try:
        load_dataset_builder(path, config, revision=revisions.get(path))
    except (OSError, ValueError, DatasetsError):
        return False
    return True


def _parts(name: str) -> tuple[str, str | None, str]:
    """Repository, configuration and split of `owner/name/config:split`; a folder has no configuration."""
    path, _, split = name.partition(":")
    if Path(path).is_absolute() or Path(path).is_dir():
        return path.rstrip("/"), None, split or "train"
    owner_and_name, config = path.split("/")[:2], "/".join(path.split("/")[2:])
    return "/".join(owner_and_name), config or None, split or "train"


def sources(settings: Data, names: list[str]) -> list[str]:
    """The source that each file or data set is. Several splits of one data set have the split in their names."""
    if settings.name != "hub":
        return [source_of_file(name) for name in names]
    times = Counter(_parts(name)[:2] for name in names)
    splits = [f"-{_parts(name)[2]}" if times[_parts(name)[:2]] > 1 else "" for name in names]
    return [source_on_hub(name) + split for name, split in zip(names, splits, strict=True)]


def source_of_file(name: str) -> str:
    """The source that a file is: its name up to the first dot."""
    return Path(name).name.split(".")[0]


def source_on_hub(name: str) -> str:
    """The source that a data set is: its name without owner and split, or the name of its folder."""
    path = name.partition(":")[0]
    if Path(path).is_absolute() or Path(path).is_dir():
        return Path(path).name
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
    csv.field_size_limit(sys.maxsize)  # a conversation may be longer than Python's 131,072 characters
    text = io.StringIO(_text(content), newline="")
    return enumerate(csv.DictReader(text, restkey="(no header)", strict=True), 1)  # a stray quote would swallow rows


def _parquet(content: bytes) -> Numbered:
    from pyarrow import BufferReader, parquet

    return enumerate(parquet.read_table(BufferReader(content)).to_pylist(), 1)


READERS = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet, ".csv": _csv}
