"""Content-addressed artifacts: each is a folder whose name is the hash of everything that determined it.

Resume, sharing between arms, and lineage all use this store. A process that makes an artifact holds a lock, writes into
a temporary folder of its own, syncs it and renames it: a reader never sees half an artifact, and a killed process
leaves none.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

from sdpo import distributed
from sdpo.console import tell
from sdpo.errors import UserError
from sdpo.metrics import CLOCK
from sdpo.store.hashing import hash_files, hash_json
from sdpo.store.publishing import complete, new_folder

NUMERICS_VERSION = 6  # raise it when a change of the code makes equal settings give other numbers
SECONDS_BETWEEN_TRIES = 0.2  # to get a lock that another process has
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # errors of a disk that has no locks


class Artifact(NamedTuple):
    key: str
    folder: Path
    reused: bool

    @property
    def is_stored(self) -> bool:
        """Whether it is in a store under its key. A model from elsewhere is not, even if another run stored it."""
        return self.folder.name == self.key[:16]


def key_of(kind: str, determinants: dict) -> str:
    """Return the SHA-256 (hex) of the canonical JSON of what determines an artifact of this kind."""
    return hash_json({"kind": kind, "numerics": NUMERICS_VERSION, **determinants})


class Store:
    """Artifacts below one folder: `root`, else `SDPO_STORE`, else `store/` in the checkout.

    An installed package has no checkout; its store is `store/` in the working directory. As a context manager it
    waits on exit until every artifact is complete.
    """

    def __init__(self, root: Path | None = None):
        checkout = Path(__file__).parents[2]
        here = checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()
        self.root = Path(root or os.environ.get("SDPO_STORE") or here / "store").resolve()
        there = next(path for path in (self.root, *self.root.parents) if path.exists())
        if not there.is_dir():
            raise UserError(f"{there} is a file, and steps are stored in folders; set SDPO_STORE to a folder")
        self._completing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.join()

    def folder(self, kind: str, key: str) -> Path:
        """Return the folder of an artifact, whether it exists or not."""
        return self.root / kind / key[:16]

    def has(self, kind: str, key: str) -> bool:
        """Return whether the artifact with this key exists."""
        return (self.folder(kind, key) / "manifest.json").is_file()

    def holds(self, kind: str, determinants: dict) -> bool:
        """Return whether the artifact with these determinants exists."""
        return self.has(kind, key_of(kind, determinants))

    def make(
        self, kind: str, determinants: dict, build: Callable[[Path], None], then: Callable[[], None] | None = None
    ) -> Artifact:
        """Return the artifact with these determinants; if it does not exist, every rank runs `build(folder)` first.

        If several processes want the same artifact, one makes it and the others wait. With `then`, a thread of every
        rank completes a new artifact, while the rank goes on: it is hashed, synced, renamed, and `then` is called.
        Before `join` its folder may not exist.
        """
        key = key_of(kind, determinants)
        final = self.folder(kind, key)
        with ExitStack() as until_whole:
            until_whole.enter_context(self._lock(kind, key))
            if distributed.broadcast(self.has(kind, key) if distributed.is_main() else None):
                return Artifact(key, final, reused=True)
            manifest = {"kind": kind, "key": key, "numerics": NUMERICS_VERSION, **determinants}
            self.publish(final, manifest, build, then, until_whole.pop_all())
        return Artifact(key, final, reused=False)

    def publish(
        self,
        final: Path,
        manifest: dict,
        build: Callable[[Path], None],
        then: Callable[[], None] | None = None,
        held: ExitStack | None = None,
    ) -> None:
        """Let every rank run `build` in a new folder, which is named `final` when it is whole and on the disk.

        `manifest` is stored in it as manifest.json, with the hash of every file. If another process made `final`
        meanwhile, its folder is kept. `then` is as in `make`; `held` is released when all is done. At most one folder
        is completed in a thread at a time. Raises UserError if `final` is a folder without a manifest.
        """
        with held or ExitStack() as until_whole:
            folder = until_whole.enter_context(new_folder(final))
            build(folder)
            if not then:
                return complete(folder, final, manifest)
            self.join()
            self._completing = _in_thread(lambda: complete(folder, final, manifest), then, until_whole.pop_all())

    def join(self) -> None:
        """Wait until the artifact that a thread completes is whole. Raises what the thread raised."""
        if not self._completing:
            return
        with CLOCK.counting("wait"):
            self._completing.exception()  # if a signal ends this wait, the end of the store waits once more
        completing, self._completing = self._completing, None
        completing.result()

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
                with CLOCK.counting("wait"):
                    time.sleep(SECONDS_BETWEEN_TRIES)
            if file:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
            yield


class ReadOnly(Store):
    """A store that makes nothing. It names a model before it exists; any other artifact must exist."""

    def make(
        self, kind: str, determinants: dict, build: Callable[[Path], None], then: Callable[[], None] | None = None
    ) -> Artifact:
        key = key_of(kind, determinants)
        found = Artifact(key, self.folder(kind, key), reused=self.has(kind, key))
        if not found.reused and kind not in ("model", "mean", "rounded"):
            raise RuntimeError(f"{found.folder} does not exist, and a read-only store cannot make it")
        return found


def damaged(artifact: Artifact, *names: str) -> list[str]:
    """Return the files (among `names`, or all) whose content is not what was stored.

    `manifest.json` is one of them if it belongs to another artifact; it is the only one if it cannot be read. Raises
    UserError if another version of this code stored the artifact, because its hashes cannot be compared.
    """
    manifest = manifest_of(artifact.folder)
    if manifest is None:
        return ["manifest.json"]
    if not is_current(manifest):
        raise UserError(f"{artifact.folder} was stored by another version of sdpo; start the run again")
    wrong = _differing(artifact.folder, manifest["files"], names or manifest["files"])
    return wrong + ["manifest.json"] * (manifest["key"] != artifact.key)


def is_current(manifest: dict) -> bool:
    """Return whether this version of the code stored the artifact of a manifest, so that it may be read."""
    return manifest.get("numerics") == NUMERICS_VERSION


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


def _in_thread(work: Callable[[], None], then: Callable[[], None], held: ExitStack) -> Future[None]:
    """Let a thread do one thing and then another, and release in the end what it held."""

    def run() -> None:
        distributed.go_to_background()
        with held:
            work()
            then()

    pool = ThreadPoolExecutor(1)
    future = pool.submit(run)
    pool.shutdown(wait=False)  # it takes no more work
    return future


def try_lock(file: IO) -> bool:
    """Lock the file until it is closed. Returns False if another process has locked it.

    On a file system without locks it returns True: locks avoid doing work twice, and no result depends on them.
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
