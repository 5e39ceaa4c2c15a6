"""Content-addressed artifacts: each is a folder whose name is the hash of everything that determined it.

Resume, sharing between arms, and lineage all use this store. A process that makes an artifact holds a lock, writes into
a temporary folder, syncs it and renames it: a reader never sees half an artifact, and a killed process leaves none.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sdpo import distributed
from sdpo.errors import UserError

NUMERICS_VERSION = 5  # raise it when a change of the code makes equal settings give other numbers


class Artifact(NamedTuple):
    key: str
    folder: Path
    reused: bool


def key_of(kind: str, determinants: dict) -> str:
    """Return the SHA-256 (hex) of the canonical JSON of what determines an artifact of this kind."""
    whole = {"kind": kind, "numerics": NUMERICS_VERSION, **determinants}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, allow_nan=False).encode()).hexdigest()


def hash_files(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file among `paths`, by its path relative to `folder`; folders are left out."""
    hashes = {}
    for path in sorted(filter(Path.is_file, paths)):
        with path.open("rb") as file:
            hashes[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


class Store:
    """Artifacts below one folder: `root`, else `SDPO_STORE`, else `store/` in the checkout."""

    def __init__(self, root: Path | None = None):
        checkout = Path(__file__).parents[1]
        self.root = Path(root or os.environ.get("SDPO_STORE") or checkout / "store").resolve()

    def folder(self, kind: str, key: str) -> Path:
        """Return the folder of an artifact, whether it exists or not."""
        return self.root / kind / key[:16]

    def has(self, kind: str, key: str) -> bool:
        """Return whether the artifact with this key exists."""
        return (self.folder(kind, key) / "manifest.json").is_file()

    def holds(self, kind: str, determinants: dict) -> bool:
        """Return whether the artifact with these determinants exists."""
        return self.has(kind, key_of(kind, determinants))

    def make(self, kind: str, determinants: dict, build: Callable[[Path], None]) -> Artifact:
        """Return the artifact with these determinants; if it does not exist, every rank runs `build(folder)` first.

        If several processes want the same artifact, one makes it and the others wait.
        """
        key = key_of(kind, determinants)
        final, temporary = self.folder(kind, key), self.folder(kind, f"tmp-{key[:12]}")
        with self._lock(kind, key):
            if distributed.broadcast(self.has(kind, key) if distributed.is_main() else None):
                return Artifact(key, final, reused=True)
            if distributed.is_main():
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            distributed.barrier()
            try:
                build(temporary)
                distributed.barrier()
                if distributed.is_main():
                    files = hash_files(temporary, temporary.rglob("*"))
                    manifest = {"kind": kind, "key": key, **determinants, "files": files}
                    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
                    _sync([*temporary.rglob("*"), temporary])
                    temporary.rename(final)
                    _sync([final.parent])
            finally:
                if distributed.is_main():
                    shutil.rmtree(temporary, ignore_errors=True)
            distributed.barrier()
        return Artifact(key, final, reused=False)

    def make_json(self, kind: str, determinants: dict, compute: Callable[[], Any]) -> Any:
        """Return a JSON value that is stored as an artifact; if it does not exist, every rank computes it first.

        Raises UserError if the stored value was changed.
        """

        def build(folder: Path) -> None:
            value = compute()
            if distributed.is_main():
                (folder / "value.json").write_text(json.dumps(value))

        artifact = self.make(kind, determinants, build)
        check(artifact)
        return json.loads((artifact.folder / "value.json").read_text())

    @contextmanager
    def _lock(self, kind: str, key: str) -> Iterator[None]:
        """Let one process at a time make this artifact; the operating system frees the lock of a killed one."""
        if not distributed.is_main():
            yield
            return
        path = self.root / "locks" / f"{kind}-{key[:16]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class ReadOnly(Store):
    """A store that makes nothing. It names a model before it exists; any other artifact must exist."""

    def make(self, kind: str, determinants: dict, build: Callable[[Path], None]) -> Artifact:
        key = key_of(kind, determinants)
        found = Artifact(key, self.folder(kind, key), reused=self.has(kind, key))
        if not found.reused and kind not in ("model", "mean", "rounded"):
            raise RuntimeError(f"{found.folder} does not exist, and a read-only store cannot make it")
        return found


def damaged(artifact: Artifact, *names: str) -> list[str]:
    """Return the files (among `names`, or all) whose content is not what was stored.

    `manifest.json` is one of them if it belongs to another artifact.
    """
    manifest = json.loads((artifact.folder / "manifest.json").read_text())
    stored = {name: manifest["files"][name] for name in names or manifest["files"]}
    found = hash_files(artifact.folder, [artifact.folder / name for name in stored])
    wrong = [name for name, digest in stored.items() if found.get(name) != digest]
    return wrong + ["manifest.json"] * (manifest["key"] != artifact.key)


def check(artifact: Artifact, *names: str) -> None:
    """Raise UserError if a file of an artifact (one of `names`, or any) is not what was stored."""
    if wrong := damaged(artifact, *names):
        raise UserError(
            f"{artifact.folder} has changed since it was written ({', '.join(wrong)}); remove it and start again"
        )


def _sync(paths: Iterable[Path]) -> None:
    """Wait until files and folders are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
