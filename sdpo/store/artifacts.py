"""Content-addressed artifacts: each is a folder whose name is the hash of everything that determined it.

Resume, sharing between arms, and lineage all use this store. A process that makes an artifact holds a lock, writes into
a temporary folder of its own, syncs it and renames it: a reader never sees half an artifact, and a killed process
leaves none.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple
from uuid import uuid4

from sdpo import distributed
from sdpo.console import tell
from sdpo.errors import UserError

NUMERICS_VERSION = 5  # raise it when a change of the code makes equal settings give other numbers
SECONDS_BETWEEN_TRIES = 0.2  # to get a lock that another process has
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # errors of a disk that has no locks


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
    """Artifacts below one folder: `root`, else `SDPO_STORE`, else `store/` in the checkout.

    An installed package has no checkout; its store is `store/` in the working directory.
    """

    def __init__(self, root: Path | None = None):
        checkout = Path(__file__).parents[2]
        here = checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()
        self.root = Path(root or os.environ.get("SDPO_STORE") or here / "store").resolve()
        there = next(path for path in (self.root, *self.root.parents) if path.exists())
        if not there.is_dir():
            raise UserError(f"{there} is a file, and steps are stored in folders; set SDPO_STORE to a folder")

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
        final = self.folder(kind, key)
        with self._lock(kind, key):
            if distributed.broadcast(self.has(kind, key) if distributed.is_main() else None):
                return Artifact(key, final, reused=True)
            publish(final, {"kind": kind, "key": key, **determinants}, build)
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
        """Let one process at a time make this artifact; the operating system frees the lock of a killed one.

        The other ranks ask rank 0 again and again, so that none of them waits in one collective until it times out.
        """
        path, told = self.root / "locks" / f"{kind}-{key[:16]}", False
        if distributed.is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+") if distributed.is_main() else nullcontext() as file:
            while not distributed.broadcast(try_lock(file) if file else None):
                if file and not told:
                    file.seek(0)
                    tell(f"waiting for {file.read() or 'another process'}, which makes {kind} {key[:16]}")
                    told = True
                time.sleep(SECONDS_BETWEEN_TRIES)
            if file:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
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

    `manifest.json` is one of them if it belongs to another artifact; it is the only one if it cannot be read.
    """
    manifest = manifest_of(artifact.folder)
    if manifest is None:
        return ["manifest.json"]
    wrong = _differing(artifact.folder, manifest["files"], names or manifest["files"])
    return wrong + ["manifest.json"] * (manifest["key"] != artifact.key)


def differing(folder: Path) -> list[str]:
    """Return the files of a published folder whose content is not what was stored. The ranks share the work."""
    manifest = distributed.broadcast(manifest_of(folder) if distributed.is_main() else None)
    if manifest is None:
        return ["manifest.json"]
    files = manifest["files"]
    mine = sorted(files)[distributed.rank() :: distributed.world_size()]
    return [name for part in distributed.gather(_differing(folder, files, mine)) for name in part]


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a published folder; None if it cannot be read."""
    try:
        return json.loads((folder / "manifest.json").read_text())
    except (FileNotFoundError, ValueError):
        return None


def _differing(folder: Path, files: dict[str, str], names: Iterable[str]) -> list[str]:
    try:
        found = hash_files(folder, [folder / name for name in names])
    except FileNotFoundError:  # another process is removing the folder
        found = {}
    return [name for name in names if found.get(name) != files.get(name)]


def check(artifact: Artifact, *names: str) -> None:
    """Raise UserError if a file of an artifact (one of `names`, or any) is not what was stored."""
    if wrong := damaged(artifact, *names):
        raise UserError(
            f"{artifact.folder} has changed since it was written ({', '.join(wrong)}); remove it and start again"
        )


def publish(final: Path, manifest: dict, build: Callable[[Path], None]) -> None:
    """Let every rank run `build` in a new folder, which is named `final` when it is whole and on the disk.

    `manifest` is stored in it as manifest.json, with the hash of every file. If another process made `final` meanwhile,
    its folder is kept. Raises UserError if `final` is a folder without a manifest.
    """
    temporary = distributed.broadcast(_temporary(final))
    if distributed.is_main():
        remove_abandoned(final.parent, final.name)
        temporary.mkdir(parents=True)
    distributed.barrier()
    try:
        build(temporary)
        distributed.barrier()
        manifest = manifest | {"files": _settle(temporary)}
        if distributed.is_main():
            (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
            _sync([temporary / "manifest.json", *filter(Path.is_dir, temporary.rglob("*")), temporary])
            _rename(temporary, final)
            _sync([final.parent])
    finally:
        if distributed.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
    distributed.barrier()


def _temporary(final: Path) -> Path:
    """A new name beside `final`, which tells the process that uses it."""
    return final.with_name(f"tmp-{final.name}-{os.getpid()}-{uuid4().hex[:8]}-{socket.gethostname()}")


def remove_abandoned(folder: Path, name: str = "*") -> None:
    """Remove what ended processes of this machine left in `folder` of what would have been called `name`."""
    for abandoned in folder.glob(f"tmp-{name}-*-{socket.gethostname()}"):
        if not _is_alive(int(abandoned.name.split("-")[2])):
            shutil.rmtree(abandoned, ignore_errors=True)  # another process may be removing it


def remove(folder: Path) -> None:
    """Remove a published folder, unless another process has done so. No process finds a part of it."""
    temporary = _temporary(folder)
    with suppress(FileNotFoundError):
        folder.rename(temporary)
        shutil.rmtree(temporary)


def _settle(folder: Path) -> dict[str, str]:
    """Put the files of a folder on the disk, readable for the group; returns their hashes. The ranks share the work."""
    found = sorted(filter(Path.is_file, folder.rglob("*"))) if distributed.is_main() else None
    mine = distributed.broadcast(found)[distributed.rank() :: distributed.world_size()]
    for path in mine:
        path.chmod(folder.stat().st_mode & 0o666)  # some libraries write files that only their owner can read
    _sync(mine)
    return {name: digest for part in distributed.gather(hash_files(folder, mine)) for name, digest in part.items()}


def _rename(temporary: Path, final: Path) -> None:
    """Rename a folder, unless another process has made `final` already."""
    try:
        temporary.rename(final)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        if not final.is_dir():  # a checkpoint, which another process has just removed
            return _rename(temporary, final)
        if not (final / "manifest.json").is_file():
            raise UserError(f"{final} is incomplete; remove it and start again") from error


def _is_alive(process: int) -> bool:
    """Whether a process of this machine lives."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()  # in a container, a restarted run often has the number of the killed one


def try_lock(file: IO) -> bool:
    """Lock the file until it is closed. Returns False if another process has locked it.

    On a disk without locks every process works: a lock saves work, but no result depends on it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _tell_no_locks(Path(file.name).parent)
    return True


@cache
def _tell_no_locks(folder: Path) -> None:
    tell(f"the disk of {folder} has no locks, so runs that want the same artifact at the same time will each make it")


def _sync(paths: Iterable[Path]) -> None:
    """Wait until files and folders are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
