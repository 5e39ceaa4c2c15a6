"""The description of a step, and what decides its key: everything that M_t depends on, and nothing else."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from inspect import signature
from typing import Any

import numpy as np

from sdpo.binding import bind, inputs_of, variants
from sdpo.config import Config, Optim
from sdpo.data.tokenize import content_hash
from sdpo.model.lora.targets import adapts_experts
from sdpo.store.artifacts import Artifact
from sdpo.train.numerics import Numerics
from sdpo.train.schedule import Span, updates
from sdpo.types import Chunk, TokenPair
from sdpo.variants import loss as losses
from sdpo.variants import token_weights


@dataclass(frozen=True)
class StepSpec:
    """A step that is not trained yet. `start` and `history` are named by their keys and need not exist yet."""

    t: int
    config: Config  # with the overrides of this step
    start: Artifact
    history: list[Artifact]  # M_0 .. M_{t-1}
    chunk: Chunk
    span: Span | None = None  # of a schedule over the whole run; None: the step has its own schedule
    followed: Sequence[list[TokenPair]] = ()  # tables of rows that every model of the run scores; not in the key

    def __post_init__(self) -> None:
        """Give the chunk's rows the weights of their tokens, if the loss does not count all tokens alike."""
        weigh = variants(token_weights).get(self.config.loss["name"])
        if weigh:
            settings = {
                name: value for name, value in self.loss.keywords.items() if name in signature(weigh).parameters
            }
            rows = [self._weighted(row, partial(weigh, **settings)) for row in self.chunk.rows]
            object.__setattr__(self, "chunk", self.chunk._replace(rows=rows))

    def _weighted(self, row: TokenPair, weigh: partial) -> TokenPair:
        number = int.from_bytes(hashlib.sha256(row.id.encode()).digest()[:8], "little")
        again = [self.t] if self.t > 1 else []  # a pair that comes in a later step, too, is drawn anew there
        return row._replace(weights=weigh(len(row.chosen), len(row.rejected), [self.config.seed, number, *again]))

    @cached_property
    def loss(self) -> partial:
        return bind(losses, self.config.loss)

    @cached_property
    def plan(self) -> list[np.ndarray]:
        """The pairs of each update, as positions in the chunk."""
        return updates(len(self.chunk.rows), self.config.optim, self.config.seed, self.in_order)

    @property
    def in_order(self) -> bool:
        """Whether the pairs are trained in the order of the chunk."""
        return self.config.split.get("within") == "score"

    @property
    def reads_reference(self) -> bool:
        return "reference" in inputs_of(self.loss)

    @property
    def reads_divergence(self) -> bool:
        """Whether the loss reads the reference's whole distribution, so that the reference is in memory, too."""
        return "divergence" in inputs_of(self.loss)

    @property
    def placebo(self) -> str:
        return self.config.reference.get("placebo", "none") if self.reads_reference else "none"


def determinants(spec: StepSpec, windows: list[dict]) -> dict[str, Any]:
    """Everything that M_t depends on. The reference rule enters by its resolved `windows`, not by its name."""
    config, chunk = spec.config, spec.chunk
    found = {
        "start": spec.start.key,
        "windows": windows,
        "rows": content_hash(chunk.rows),
        "loss": {"name": config.loss["name"], **spec.loss.keywords},
        "tune": config.tune,
        "optim": _optim(config.optim),
        "seed": config.seed,
        **Numerics(config).all,
    }
    if spec.in_order:
        found["order"] = "of the chunk"
    if "ratings" in inputs_of(spec.loss):
        found["ratings"] = repr(chunk.ratings_N2.tolist())
    if windows and spec.placebo != "none":
        found["placebo"] = {"name": spec.placebo, "initial": spec.history[0].key}
    moves = len(windows) > 1 or any("bound" in window for window in windows)
    if chunk.probes and (config.probe.every or moves):  # then the artifact has log-probs of these rows
        found["probe"] = {"every": config.probe.every, "rows": content_hash(chunk.probes)}
    if spec.span:
        found["span"] = spec.span
    initial, remote = spec.history[0].folder, config.model.trust_remote_code
    if "targets" in config.tune and initial.is_dir() and adapts_experts(initial, config.tune["targets"], remote):
        found["experts"] = "adapted"  # earlier releases left them frozen
    return found


def _optim(optim: Optim) -> dict[str, Any]:
    """The settings of the optimiser, without `states` if they are fp32, as in earlier releases.

    A run resolves `auto` before its first step; engines that are opened without a run take it for fp32.
    """
    plain = ("fp32", "auto")
    return {key: value for key, value in asdict(optim).items() if key != "states" or value not in plain}
