"""Checkpoints inside a step, from which a killed step continues. They are safetensors and JSON, never pickle.

A checkpoint holds the masters, the optimiser's moments, the reference log-probs and the log. It needs no random state,
which is derived from the seed and the number of the update.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from sdpo import distributed
from sdpo.errors import UserError
from sdpo.model.engine import Engine
from sdpo.store import hash_files

# Log-probs that the next updates read. Their hash is checked, because no later check would notice a change.
REFERENCE = "reference.safetensors"


class Saved(NamedTuple):
    """What a checkpoint holds apart from the engine's state."""

    tensors: dict[str, torch.Tensor]
    log: dict[str, Any]  # JSON; `entries` are the log entries of the updates so far


class Checkpoint:
    """The checkpoints of one step; the newest complete one counts. `name` is shown in the progress bar."""

    def __init__(self, folder: Path, name: str, minutes: float):
        self.folder, self.name, self.seconds = folder, name, 60 * minutes
        self.last_save = time.monotonic()

    def restore(self, engine: Engine) -> Saved | None:
        """Load the newest checkpoint into the engine and return the rest of it; None if there is no checkpoint.

        Raises UserError if the reference log-probs in it have changed.
        """
        newest = self._newest()
        if newest is None:
            return None
        _load_masters(engine, newest)
        load_moments(engine, newest)
        log = json.loads((newest / "log.json").read_text())
        if log["hashes"] != hash_files(newest, [newest / REFERENCE]):
            raise UserError(f"{newest / REFERENCE} has changed since it was written; remove {self.folder}")
        return Saved(load_file(newest / REFERENCE), log)

    def due(self) -> bool:
        """Whether it is time for the next checkpoint, by rank 0's clock."""
        return distributed.broadcast(time.monotonic() - self.last_save >= self.seconds)

    def save(self, engine: Engine, state: Saved) -> None:
        """Write a checkpoint. It is complete once its folder has been renamed, which is the last thing done."""
        work, final = self.folder / "unfinished", self.folder / f"{len(state.log['entries']):08}"
        if distributed.is_main():
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
        distributed.barrier()
        _save_masters(engine, work)
        save_moments(engine, work)
        if distributed.is_main():
            save_file(state.tensors, work / REFERENCE)
            hashes = hash_files(work, [work / REFERENCE])
            (work / "log.json").write_text(json.dumps(state.log | {"hashes": hashes}))
        distributed.barrier()
        if distributed.is_main():
            earlier = self._newest()
            work.rename(final)
            if earlier:
                shutil.rmtree(earlier)
        self.last_save = time.monotonic()

    def clear(self) -> None:
        """Remove the checkpoints of a finished step."""
        if distributed.is_main():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _newest(self) -> Path | None:
        return max(self.folder.glob("[0-9]*"), default=None)


def _save_masters(engine: Engine, folder: Path) -> None:
    _write({str(index): master.detach() for index, master in enumerate(engine.parts)}, engine, folder / "masters")


@torch.no_grad()
def _load_masters(engine: Engine, folder: Path) -> None:
    for index, tensor in _read(engine, folder / "masters").items():
        engine.parts[int(index)].copy_(tensor)
    engine.refresh()


def save_moments(engine: Engine, folder: Path) -> None:
    """Write the optimiser's tensors, named INDEX/NAME by the index of their master in `engine.parts` and their name."""
    moments = {
        f"{index}/{name}": tensor.contiguous()
        for index, master in enumerate(engine.parts)
        for name, tensor in engine.optimizer.state[master].items()
    }
    _write(moments, engine, folder / "moments")


def load_moments(engine: Engine, folder: Path) -> None:
    """Load what `save_moments` wrote into the optimiser."""
    for full_name, tensor in _read(engine, folder / "moments").items():
        index, name = full_name.split("/")
        master = engine.parts[int(index)]
        engine.optimizer.state[master][name] = tensor.to(master.device)


def _write(tensors: dict[str, torch.Tensor], engine: Engine, path: Path) -> None:
    """Write the tensors of this rank's part; of the ranks with the same part, only the first one writes."""
    if engine.part == distributed.rank():
        save_file(tensors, f"{path}-{engine.part}.safetensors")


def _read(engine: Engine, path: Path) -> dict[str, torch.Tensor]:
    return load_file(f"{path}-{engine.part}.safetensors")
