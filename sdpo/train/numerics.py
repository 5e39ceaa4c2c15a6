"""The settings that change the last digits of a result. The key of an artifact has those that matter to its kind."""

from dataclasses import asdict
from typing import Any

from sdpo import distributed
from sdpo.config import Config
from sdpo.model.layers import kernels_of


class Numerics:
    """How a run computes, by the names in the keys of artifacts; `device` is the type that this machine has for it."""

    def __init__(self, config: Config):
        launch = config.launch
        self.all: dict[str, Any] = {
            "precision": config.precision,
            "save_dtype": config.save_dtype,
            "ranks": launch.ranks,
            "threads": launch.threads,
            "attention": launch.attention,
            "compile": launch.compile,
            "deepspeed": {key: value for key, value in asdict(config.deepspeed).items() if key != "config" or value},
            "device": distributed.device(launch.device).type,
        }
        kernels = kernels_of(launch, distributed.device(launch.device))
        if kernels != "plain":
            self.all["kernels"] = kernels

    def of_logprobs(self) -> dict[str, Any]:
        """For log-probs of packs, which ranks, threads and the DeepSpeed stage do not change."""
        return self._only("precision", "device", "attention", "compile", "kernels")

    def of_packs(self) -> dict[str, Any]:
        """For log-probs of packs under a model whose layers are never compiled or fused."""
        return self._only("precision", "device", "attention")

    def of_own_forward(self) -> dict[str, Any]:
        """For a model's own forward pass, without packs."""
        return self._only("precision", "device")

    def _only(self, *names: str) -> dict[str, Any]:
        return {name: self.all[name] for name in names if name in self.all}
