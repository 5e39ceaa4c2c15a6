"""The settings that change the last digits of a result: one method per kind of artifact gives its part of the key."""

from dataclasses import asdict
from typing import Any, NamedTuple, Self

from sdpo import distributed
from sdpo.config import Config


class Numerics(NamedTuple):
    """How a run computes, whatever it computes. Field names are those of the keys."""

    precision: str
    save_dtype: str
    ranks: int
    threads: int
    attention: str
    compile: bool
    deepspeed: dict[str, Any]
    device: str

    @classmethod
    def of(cls, config: Config) -> Self:
        """Read them from a configuration; `device` is the kind of device that this machine gives."""
        launch = config.launch
        return cls(
            config.precision,
            config.save_dtype,
            launch.ranks,
            launch.threads,
            launch.attention,
            launch.compile,
            asdict(config.deepspeed),
            distributed.device(launch.device).type,
        )

    def of_training(self) -> dict[str, Any]:
        """A step depends on all of them."""
        return self._asdict()

    def of_logprobs(self) -> dict[str, Any]:
        """Log-probs of packs do not depend on ranks, threads or the DeepSpeed stage."""
        return self._only("precision", "device", "attention", "compile")

    def of_packs(self) -> dict[str, Any]:
        """Log-probs of a model that is never compiled."""
        return self._only("precision", "device", "attention")

    def of_own_forward(self) -> dict[str, Any]:
        """A model's own forward pass, without packs."""
        return self._only("precision", "device")

    def _only(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}
