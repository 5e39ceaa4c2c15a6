"""Folders that are whole when they have their name: written under another one, hashed, synced, then renamed."""

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from sdpo import distributed
from sdpo.errors import UserError
from sdpo.metrics import CLOCK
from sdpo.store.hashing import WeightsFile, hash_files, read_weights, remember

_own: set[Path] = set()  # the folders that this process is writing


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A temporary folder beside `final`, shared by all ranks; on exit it is removed unless it was renamed."""
    temporary = distributed.broadcast(_temporary(final))
    _own.add(temporary)
    if distributed.is_main():
        remove_abandoned(final.parent, final.name)
        temporary.mkdir(parents=True)
    distributed.barrier()
    try:
        yield temporary
    finally:
        if distributed.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        _own.discard(temporary)


def _temporary(final: Path) -> Path:
    """A new temporary name beside `final`, with the process id and the host in it."""
    return final.with_name(f"tmp-{final.name}-{os.getpid()}-{uuid4().hex[:8]}-{socket.gethostname()}")


def remove_abandoned(folder: Path, name: str = "*") -> None:
    """Remove the temporary folders for `name` in `folder` whose process, on this machine, has ended."""
    for abandoned in folder.glob(f"tmp-{name}-*-{socket.gethostname()}"):
        if abandoned not in _own and not _is_alive(int(abandoned.name.split("-")[2])):
            shutil.rmtree(abandoned, ignore_errors=True)  # another process may be removing it


def remove(folder: Path) -> None:
    """Remove a published folder, unless another process has done so. No process finds a part of it."""
    temporary = _temporary(folder)
    with suppress(FileNotFoundError):
        folder.rename(temporary)
        shutil.rmtree(temporary)


def complete(temporary: Path, final: Path, manifest: dict) -> None:
    """Hash the files that the ranks wrote, put them on the disk, and name their folder."""
    distributed.barrier()
    manifest = manifest | {"files": _settle(temporary)}
    distributed.barrier()  # every rank has looked at the files under their first names
    distributed.gather_results(lambda: _give_name(temporary, final, manifest) if distributed.is_main() else None)


def _give_name(temporary: Path, final: Path, manifest: dict) -> None:
    """Put the manifest and the folder itself on the disk, then rename the folder."""
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    _sync([temporary / "manifest.json", *filter(Path.is_dir, temporary.rglob("*")), temporary])
    _rename(temporary, final)
    _sync([final.parent])


def _settle(folder: Path) -> dict[str, str]:
    """Put the files of a folder on the disk, readable for the group; returns their hashes. The ranks share the work."""
    found = sorted(filter(Path.is_file, folder.rglob("*"))) if distributed.is_main() else None
    mine = distributed.broadcast(found)[distributed.rank() :: distributed.world_size()]

    def settle_mine() -> tuple[dict[str, str], dict[Path, WeightsFile]]:
        for path in mine:
            path.chmod(folder.stat().st_mode & 0o666)  # some libraries write files that only their owner can read
        _sync(mine)
        weights = {path: read_weights(path) for path in mine if path.suffix == ".safetensors"}
        return hash_files(folder, mine), weights

    shared = distributed.gather_results(settle_mine)
    for path, hashes in ((path, hashes) for _, part in shared for path, hashes in part.items()):
        remember(path, hashes)
    return {name: digest for part, _ in shared for name, digest in part.items()}


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


def _sync(paths: Iterable[Path]) -> None:
    """Wait until files and folders are on the disk."""
    with CLOCK.counting("save"):
        for path in paths:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
