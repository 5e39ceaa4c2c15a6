"""The state inside a step, so that a killed step continues where it was: safetensors and JSON, never pickle.

Random state is derived from the seed and the update, so masters, optimiser moments and the log are all there is.
"""

import json
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from sdpo import distributed
from sdpo.errors import UserError
from sdpo.model.engine import Engine
from sdpo.store import hash_files

REFERENCE = "reference.safetensors"  # log-probs that the next updates read: no gate would notice that they changed


class Saved(NamedTuple):
    """What a checkpoint holds besides the engine's state."""

    tensors: dict[str, torch.Tensor]
    log: dict  # JSON; `entries` are the log entries of the updates so far


class Checkpoint:
    """Checkpoints of one step, named by its key; the newest complete one counts."""

    def __init__(self, folder: Path, name: str, minutes: float):
        self.folder, self.name, self.seconds = folder, name, 60 * minutes
        self.saved = time.monotonic()

    def restore(self, engine: Engine) -> Saved | None:
        """Bring the engine to the newest checkpoint and return the rest of it; None if there is no checkpoint."""
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
        """Whether the last checkpoint is old enough, as rank 0's clock has it."""
        return distributed.broadcast(time.monotonic() - self.saved >= self.seconds)

    def save(self, engine: Engine, state: Saved) -> None:
        """Write a checkpoint; it counts once its folder is renamed, at the end."""
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
        self.saved = time.monotonic()

    def clear(self) -> None:
        """Remove what a finished step no longer needs."""
        if distributed.is_main():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _newest(self) -> Path | None:
        return max(self.folder.glob("[0-9]*"), default=None)


def _save_masters(engine: Engine, folder: Path) -> None:
    _write({str(place): master.detach() for place, master in enumerate(engine.parts)}, engine, folder / "masters")


@torch.no_grad()
def _load_masters(engine: Engine, folder: Path) -> None:
    for place, tensor in _read(engine, folder / "masters").items():
        engine.parts[int(place)].copy_(tensor)
    engine.refresh()


def save_moments(engine: Engine, folder: Path) -> None:
    """Write the optimiser's tensors, named by their part's place and their own name."""
    moments = {
        f"{place}/{name}": tensor.contiguous()
        for place, master in enumerate(engine.parts)
        for name, tensor in engine.optimizer.state[master].items()
    }
    _write(moments, engine, folder / "moments")


def load_moments(engine: Engine, folder: Path) -> None:
    """Give the optimiser what was written."""
    for full_name, tensor in _read(engine, folder / "moments").items():
        place, name = full_name.split("/")
        master = engine.parts[int(place)]
        engine.optimizer.state[master][name] = tensor.to(master.device)


def _write(tensors: dict[str, torch.Tensor], engine: Engine, path: Path) -> None:
    """Keep the tensors of this rank's part; of ranks that have the same part the first one writes."""
    if engine.part == distributed.rank():
        save_file(tensors, f"{path}-{engine.part}.safetensors")


def _read(engine: Engine, path: Path) -> dict[str, torch.Tensor]:
    return load_file(f"{path}-{engine.part}.safetensors")
