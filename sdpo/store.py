"""Content-addressed artifacts: a folder named by the hash of everything that determined it.

Resume, sharing between arms and lineage are this one mechanism. Under a lock the maker works in a temporary
folder, syncs it and renames it, so that a reader never sees half an artifact and a dead maker leaves nothing valid.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sdpo import distributed
from sdpo.errors import UserError

NUMERICS_VERSION = 5  # raised whenever the same settings would give other numbers


class Artifact(NamedTuple):
    key: str
    folder: Path
    reused: bool


def key_of(kind: str, determinants: dict) -> str:
    """SHA-256 (hex) of the canonical JSON of what determines an artifact of this kind."""
    whole = {"kind": kind, "numerics": NUMERICS_VERSION, **determinants}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, allow_nan=False).encode()).hexdigest()


def hash_files(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of the files among some paths below a folder, by their name there."""
    hashes = {}
    for path in sorted(filter(Path.is_file, paths)):
        with path.open("rb") as file:
            hashes[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


class Store:
    """Artifacts below one folder (`SDPO_STORE`, else `store/` in the checkout)."""

    def __init__(self, root: Path | None = None):
        checkout = Path(__file__).parents[1]
        self.root = Path(root or os.environ.get("SDPO_STORE") or checkout / "store").resolve()

    def folder(self, kind: str, key: str) -> Path:
        return self.root / kind / key[:16]

    def has(self, kind: str, key: str) -> bool:
        return (self.folder(kind, key) / "manifest.json").is_file()

    def holds(self, kind: str, determinants: dict) -> bool:
        """Whether the artifact of these determinants exists."""
        return self.has(kind, key_of(kind, determinants))

    def make(self, kind: str, determinants: dict, build: Callable[[Path], None]) -> Artifact:
        """The artifact of these determinants: found, or built by `build(folder)` on every rank.

        Concurrent runs that want the same artifact wait for the one that makes it.
        """
        key = key_of(kind, determinants)
        final, work = self.folder(kind, key), self.folder(kind, f"tmp-{key[:12]}")
        with self._lock(kind, key):
            if distributed.broadcast(self.has(kind, key) if distributed.is_main() else None):
                return Artifact(key, final, reused=True)
            if distributed.is_main():
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True)
            distributed.barrier()
            try:
                build(work)
                distributed.barrier()
                if distributed.is_main():
                    manifest = {"kind": kind, "key": key, **determinants, "files": hash_files(work, work.rglob("*"))}
                    (work / "manifest.json").write_text(json.dumps(manifest, indent=1))
                    _sync([*work.rglob("*"), work])
                    work.rename(final)
                    _sync([final.parent])
            finally:
                if distributed.is_main():
                    shutil.rmtree(work, ignore_errors=True)
            distributed.barrier()
        return Artifact(key, final, reused=False)

    def make_json(self, kind: str, determinants: dict, compute: Callable[[], object]) -> object:
        """A JSON value kept as an artifact: read where it exists, else computed on every rank and written."""

        def build(folder: Path) -> None:
            value = compute()
            if distributed.is_main():
                (folder / "value.json").write_text(json.dumps(value))

        artifact = self.make(kind, determinants, build)
        check(artifact)
        return json.loads((artifact.folder / "value.json").read_text())

    @contextmanager
    def _lock(self, kind: str, key: str) -> Iterator[None]:
        """Exclusive among runs; the operating system frees the lock of a dead maker."""
        if not distributed.is_main():
            yield
            return
        path = self.root / "locks" / f"{kind}-{key[:16]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class ReadOnly(Store):
    """The same artifacts, none of which is made: models are named before they exist, anything else has to exist."""

    def make(self, kind: str, determinants: dict, build: Callable[[Path], None]) -> Artifact:
        key = key_of(kind, determinants)
        found = Artifact(key, self.folder(kind, key), reused=self.has(kind, key))
        if not found.reused and kind not in ("model", "mean", "rounded"):
            raise RuntimeError(f"a {kind} was asked of a read-only store, and does not exist")
        return found


def damaged(artifact: Artifact, *names: str) -> list[str]:
    """The files (of these names, or all) that are not what was stored, and `manifest.json` where it is another's."""
    manifest = json.loads((artifact.folder / "manifest.json").read_text())
    stored = {name: manifest["files"][name] for name in names or manifest["files"]}
    found = hash_files(artifact.folder, [artifact.folder / name for name in stored])
    wrong = [name for name, digest in stored.items() if found.get(name) != digest]
    return wrong + ["manifest.json"] * (manifest["key"] != artifact.key)


def check(artifact: Artifact, *names: str) -> None:
    """UserError where an artifact (or its files of these names) is not what was stored: nothing damaged is served."""
    if wrong := damaged(artifact, *names):
        raise UserError(
            f"{artifact.folder} has changed since it was written ({', '.join(wrong)}); remove it and start again"
        )


def _sync(paths: Iterable[Path]) -> None:
    """Put files and folders on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
