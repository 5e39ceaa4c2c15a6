"""Checkpoints inside a step, from which a killed step continues. They are safetensors and JSON, never pickle.

A checkpoint holds the masters, the optimiser's moments, the reference log-probs and the log. It needs no random state,
which is derived from the seed and the number of the update.
"""

import json
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from sdpo import distributed
from sdpo.console import tell
from sdpo.errors import UserError
from sdpo.metrics import CLOCK
from sdpo.model.checkpoints import redivision
from sdpo.model.engine import Engine
from sdpo.model.parameters import moments_of, set_moments
from sdpo.model.zero import Zero
from sdpo.store.artifacts import Store, differing
from sdpo.store.publishing import remove, remove_abandoned

SPARING = 20  # the next checkpoint is at least this many times as far away as the last one took


class Saved(NamedTuple):
    """What a checkpoint holds apart from the engine's state."""

    tensors: dict[str, torch.Tensor]
    log: dict[str, Any]  # JSON; `entries` are the log entries of the updates so far


class Checkpoint:
    """The checkpoints of one step: the newest one and the one before. `name` is shown in the progress bar.

    The next one is due after `minutes`, or after 20 times as long as the last one took, whichever is longer; with 0,
    after every group of updates. If there is none, one of the same step under `other_keys` is used.
    """

    def __init__(self, store: Store, key: str, name: str, minutes: float, other_keys: Iterable[str] = ()):
        self.store, self.folder, self.name = store, store.folder("partial", key), name
        self.others = [store.folder("partial", other) for other in other_keys]
        self.seconds = self.wanted = 60 * minutes
        self.last_save = time.monotonic()

    def restore(self, engine: Engine) -> Saved | None:
        """Load the newest whole checkpoint into the engine and return the rest of it; None if there is no checkpoint.

        Raises UserError if files of every checkpoint have changed.
        """
        found = distributed.broadcast(self._found() or self._found_elsewhere())
        for position, folder in enumerate(found):
            if wrong := differing(folder):
                tell(f"{self.name}: {folder / wrong[0]} has changed since it was written; not going on from there")
            elif loaded := _load(engine, folder):
                self._remove(found[:position])
                return loaded
        if distributed.broadcast(any(folder.exists() for folder in found)):
            raise UserError(f"no checkpoint in {self.folder} is as it was written; remove that folder and start again")
        return None

    def due(self) -> bool:
        """Whether it is time for the next checkpoint, by the clock of this rank."""
        return time.monotonic() - self.last_save >= self.seconds

    def save(self, engine: Engine, state: Saved) -> None:
        """Write a checkpoint, then remove all but the newest two. A thread may complete it while the step goes on."""
        began = time.monotonic()

        def build(folder: Path) -> None:
            masters = {str(index): master.detach() for index, master in enumerate(engine.parts)}
            _write(masters, engine, folder / "masters")
            save_moments(engine, folder)
            if distributed.is_main():
                save_file(state.tensors, folder / "reference.safetensors")
                (folder / "log.json").write_text(json.dumps(state.log))

        def clean() -> None:
            self._remove(self._found()[2:])
            self.last_save = time.monotonic()
            if self.wanted:
                self.seconds = max(self.wanted, SPARING * (self.last_save - began))

        with CLOCK.counting("save"):
            self.store.publish(self.folder / f"{len(state.log['entries']):08}", {}, build, then=clean)
        self.last_save = time.monotonic()

    def join(self) -> None:
        """Wait until the last checkpoint is whole."""
        self.store.join()

    def clear(self) -> None:
        """Remove all checkpoints of a finished step, but not what another process is just writing."""
        for folder in (self.folder, *self.others) if distributed.is_main() else ():
            if folder.is_dir():
                self._remove(_whole(folder))
                remove_abandoned(folder)
                with suppress(OSError):  # another process is writing in it
                    folder.rmdir()

    def _remove(self, folders: list[Path]) -> None:
        if distributed.is_main():
            for folder in folders:
                remove(folder)

    def _found(self) -> list[Path]:
        """The whole checkpoints, newest first."""
        return _whole(self.folder)

    def _found_elsewhere(self) -> list[Path]:
        """The whole checkpoints of the step under other keys, those with the most updates first."""
        found = [folder for other in self.others if other.is_dir() for folder in _whole(other)]
        return sorted(found, key=lambda folder: folder.name, reverse=True)


def _whole(folder: Path) -> list[Path]:
    return sorted((path.parent for path in folder.glob("[0-9]*/manifest.json")), reverse=True)


def _load(engine: Engine, folder: Path) -> Saved | None:
    """Load a checkpoint into the engine and return the rest of it.

    None, with the engine as it was, if another process has removed it. Locks prevent this, but not every disk has them.
    """
    try:
        masters, moments = (_read(engine, folder / name) for name in ("masters", "moments"))
        rest = Saved(load_file(folder / "reference.safetensors"), json.loads((folder / "log.json").read_text()))
        is_there = True
    except FileNotFoundError:
        is_there = False
    if not all(distributed.gather(is_there)):
        return None
    with torch.no_grad():
        for index, tensor in masters.items():
            engine.parts[int(index)].copy_(tensor)
    engine.refresh()
    _set_moments(engine, moments)
    return rest


def save_moments(engine: Engine, folder: Path) -> None:
    """Write the optimiser's tensors, named INDEX/NAME by the index of their master in `engine.parts` and their name."""
    moments = {
        f"{index}/{name}": tensor.contiguous()
        for index, master in enumerate(engine.parts)
        for name, tensor in moments_of(engine.optimizer, master).items()
    }
    _write(moments, engine, folder / "moments")


def load_moments(engine: Engine, folder: Path) -> None:
    """Load what `save_moments` wrote into the optimiser."""
    _set_moments(engine, _read(engine, folder / "moments"))


def _set_moments(engine: Engine, tensors: dict[str, torch.Tensor]) -> None:
    found: dict[int, dict[str, torch.Tensor]] = {}
    for full_name, tensor in tensors.items():
        index, name = full_name.split("/")
        found.setdefault(int(index), {})[name] = tensor
    for position, moments in found.items():
        set_moments(engine.optimizer, engine.parts[position], moments)


def _write(tensors: dict[str, torch.Tensor], engine: Engine, path: Path) -> None:
    """Write the tensors of this rank's part; of the ranks with the same part, only the first one writes."""
    if engine.part == distributed.rank():
        save_file(tensors, f"{path}-{engine.part}.safetensors")


def _read(engine: Engine, path: Path) -> dict[str, torch.Tensor]:
    """This rank's part of what `_write` wrote, on this number of ranks or another one."""
    num_parts = len(list(path.parent.glob(f"{path.name}-*.safetensors")))
    if num_parts == engine.num_parts or not num_parts:  # none: another process has removed them
        return load_file(f"{path}-{engine.part}.safetensors")
    assert isinstance(engine, Zero), "Plain divides nothing"
    return redivision.read([Path(f"{path}-{part}.safetensors") for part in range(num_parts)], engine)
