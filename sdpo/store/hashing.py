"""Hashes of files and of tensors. Weights have the same hash in memory, in one file and in several.

Weights are hashed by tensor and in pieces, in threads, because SHA-256 of one stream would use one core. Their hashes
are kept for this process until a file is written again, so that it never hashes the same bytes twice.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, NamedTuple

from sdpo.metrics import CLOCK

PIECE = 2**24  # bytes
THREADS = min(16, os.cpu_count() or 1)
TICK = 0.02  # seconds within which two changes of a file can have the same time stamp


class Block(NamedTuple):
    """A tensor's dtype (as safetensors names it), shape and bytes."""

    dtype: str
    shape: list[int]
    content: memoryview


class WeightsFile(NamedTuple):
    """The hashes of a safetensors file: of the header as it stands there, and of every tensor by name."""

    header: str
    tensors: dict[str, str]


_known: dict[tuple[int, ...], WeightsFile] = {}  # by `_version`


def hash_json(value: Any) -> str:
    """Return the SHA-256 (hex) of a JSON value in its canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def hash_blocks(blocks: Mapping[str, Block]) -> dict[str, str]:
    """Return the hash of each tensor by name: of its dtype, its shape and the hashes of its pieces."""
    pieces = [
        (name, content[at : at + PIECE])
        for name, (_, _, content) in blocks.items()
        for at in range(0, len(content), PIECE)
    ]
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda piece: hashlib.sha256(piece[1]).hexdigest(), pieces)
        found: dict[str, list[str]] = {name: [] for name in blocks}
        for (name, _), digest in zip(pieces, digests, strict=True):
            found[name].append(digest)
    return {name: hash_json([block.dtype, block.shape, found[name]]) for name, block in blocks.items()}


def hash_weights(paths: Iterable[Path]) -> str:
    """Return the hash of all tensors in some safetensors files, which does not depend on how the files are cut."""
    return hash_json({name: digest for path in paths for name, digest in read_weights(path).tensors.items()})


def hash_files(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """Return the hash of each file among `paths`, by its path relative to `folder`; folders are left out.

    For most files it is the SHA-256 of the bytes; for a safetensors file, the hash of the hashes of its header and its
    tensors.
    """
    hashes = {}
    for path in sorted(filter(Path.is_file, paths)):
        if path.suffix == ".safetensors":
            digest = hash_json(read_weights(path))
        else:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        hashes[str(path.relative_to(folder))] = digest
    return hashes


def read_weights(path: Path) -> WeightsFile:
    """Return the hashes of a safetensors file: known ones, unless the file was written since they were computed."""
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        if _version(stat) not in _known:
            time.sleep(min(TICK, max(0.0, stat.st_ctime + TICK - time.time())))  # so that a later change has another
            with CLOCK.counting("hash"):
                content = mmap(file.fileno(), 0, access=ACCESS_READ) if stat.st_size else b""
                _known[_version(stat)] = _read(memoryview(content))
    return _known[_version(stat)]


def remember(path: Path, hashes: WeightsFile) -> None:
    """Know the hashes of a file that another rank has just computed."""
    _known.setdefault(_version(path.stat()), hashes)


def _version(stat: os.stat_result) -> tuple[int, ...]:
    """What changes whenever a file is written."""
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def _read(whole: memoryview) -> WeightsFile:
    try:
        begin = 8 + int.from_bytes(whole[:8], "little")
        entries = {name: entry for name, entry in json.loads(bytes(whole[8:begin])).items() if name != "__metadata__"}
        ends = {name: [begin + end for end in entry["data_offsets"]] for name, entry in entries.items()}
        blocks = {
            name: Block(entry["dtype"], entry["shape"], whole[slice(*ends[name])]) for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):  # damaged: whoever loads it will say so
        begin, blocks = 0, {"": Block("", [len(whole)], whole)}
    return WeightsFile(hashlib.sha256(whole[:begin]).hexdigest(), hash_blocks(blocks))
