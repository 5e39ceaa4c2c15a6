"""The settings that change the last digits of a result. The key of an artifact has those that matter to its kind."""

from dataclasses import asdict
from typing import Any, NamedTuple, Self

from sdpo import distributed
from sdpo.config import Config


class Numerics(NamedTuple):
    """How a run computes. The field names are those in the keys of artifacts."""

    precision: str
    save_dtype: str
    ranks: int
    threads: int
    attention: str
    compile: bool
    deepspeed: dict[str, Any]
    device: str

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """The numerics of a run; `device` is the type of the device that this machine has for it."""
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
        """For a trained step: all of them."""
        return self._asdict()

    def of_logprobs(self) -> dict[str, Any]:
        """For log-probs of packs, which ranks, threads and the DeepSpeed stage do not change."""
        return self._only("precision", "device", "attention", "compile")

    def of_packs(self) -> dict[str, Any]:
        """For log-probs of packs under a model that is never compiled."""
        return self._only("precision", "device", "attention")

    def of_own_forward(self) -> dict[str, Any]:
        """For a model's own forward pass, without packs."""
        return self._only("precision", "device")

    def _only(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}
