"""The state inside a step, so that a killed step continues where it was: safetensors and JSON, never pickle.

Random state is derived from the seed and the update, so masters, optimiser moments and the log are all there is.
"""

import json
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sdpo import launch
from sdpo.engine import Engine
from sdpo.moving import MovingReference


class Checkpoint:
    """Checkpoints of one step, named by its key; the newest complete one counts."""

    def __init__(self, folder: Path, name: str, minutes: float):
        self.folder, self.name, self.seconds = folder, name, 60 * minutes
        self.saved = time.monotonic()

    def restore(self, engine: Engine, reference: MovingReference) -> list[dict]:
        """Bring engine and reference to the newest checkpoint; returns its log entries, none where the step begins."""
        newest = self._newest()
        if newest is None:
            return []
        engine.set_weights(load_file(newest / "weights.safetensors"))
        load_moments(engine, newest)
        reference.restore(load_file(newest / "reference.safetensors"))
        log = json.loads((newest / "log.json").read_text())
        reference.report = log["windows"]
        return log["entries"]

    def save(self, engine: Engine, reference: MovingReference, entries: list[dict]) -> None:
        """Write a checkpoint if the last one is old enough; the rename that ends it makes it count."""
        if not launch.broadcast(time.monotonic() - self.saved >= self.seconds):
            return
        work, final = self.folder / "unfinished", self.folder / f"{len(entries):08}"
        if launch.is_main():
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
        launch.barrier()
        weights = engine.weights()
        save_moments(engine, work)
        if launch.is_main():
            save_file(weights, work / "weights.safetensors")
            save_file(reference.state(), work / "reference.safetensors")
            (work / "log.json").write_text(json.dumps({"entries": entries, "windows": reference.report}))
        launch.barrier()
        if launch.is_main():
            earlier = self._newest()
            work.rename(final)
            if earlier:
                shutil.rmtree(earlier)
        self.saved = time.monotonic()

    def clear(self) -> None:
        """Remove what a finished step no longer needs."""
        if launch.is_main():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _newest(self) -> Path | None:
        return max(self.folder.glob("[0-9]*"), default=None)


def save_moments(engine: Engine, folder: Path) -> None:
    """Write this rank's optimiser tensors, named by the parameter's place and their own name."""
    moments = {
        f"{place}/{name}": tensor.contiguous()
        for place, param in enumerate(_params(engine))
        for name, tensor in engine.optimizer.state[param].items()
    }
    save_file(moments, folder / f"moments-{launch.rank()}.safetensors")


def load_moments(engine: Engine, folder: Path) -> None:
    """Give the optimiser what this rank wrote."""
    params = _params(engine)
    for full_name, tensor in load_file(folder / f"moments-{launch.rank()}.safetensors").items():
        place, name = full_name.split("/")
        engine.optimizer.state[params[int(place)]][name] = tensor.to(params[int(place)].device)


def _params(engine: Engine) -> list[torch.Tensor]:
    return [param for group in engine.optimizer.param_groups for param in group["params"]]
