"""The one model in memory. Keeps at most one model loaded; unloads it before loading another.

Log-probs are artifacts: rows that were scored once under some weights are read from the store from then on.

Shape suffixes: N rows; columns are the chosen and the rejected response.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdpo import distributed
from sdpo.binding import bind
from sdpo.config import Config
from sdpo.console import Progress, tell
from sdpo.data.prompt_and_answer import ChatFormat, as_trained
from sdpo.data.tokenize import content_hash
from sdpo.errors import UserError
from sdpo.metrics import CLOCK
from sdpo.model import hub, layers
from sdpo.model.engine import Engine, Plain, open_engine
from sdpo.model.logprobs import Scorer, check_packing, exceeds_rounding, naive_logprobs, score
from sdpo.model.lora import adapters
from sdpo.model.memory import explained, scoring_budget
from sdpo.model.packing import tokens_of
from sdpo.store.artifacts import Artifact, Store, check, damaged
from sdpo.train import logprob_table
from sdpo.train.numerics import Numerics
from sdpo.train.step_key import StepSpec
from sdpo.types import TokenPair
from sdpo.variants import tune

NUM_AUDITED = 4  # rows of every reference table that are scored again when a step reads it


class Runner:
    """Loads models, scores rows with them, and saves what was trained."""

    def __init__(
        self, config: Config, store: Store, tokenizer: PreTrainedTokenizerBase, named_stops: Sequence[int] = ()
    ):
        """`named_stops` are the ids at which S's generation config ends an answer."""
        self.config, self.store, self.tokenizer, self.named_stops = config, store, tokenizer, named_stops
        self.device = distributed.device(config.launch.device)
        self.numerics = Numerics(config)
        self.foreign: dict[str, dict[str, TokenPair]] = {}  # key of a model with another tokenizer -> row id -> its row
        self.scored = np.zeros(2)  # tokens and seconds of all passes for log-probs so far
        self._reported_backend = self._kernels = ""
        self._checked: set[tuple[str, ...]] = set()
        self._engine: Engine | None = None
        self._loaded: str | None = None  # the key of the weights in memory
        self._is_exact = False  # whether the weights in memory are the file's, not rounded to bf16, as training needs
        self._adapter: adapters.AdapterSpec | None = None  # if one is trained

    @property
    def chat(self) -> ChatFormat:
        """How prompts and answers are written, and at which ids the run's models stop."""
        data = self.config.data
        return ChatFormat(self.tokenizer, data.template, data.template_date, self.named_stops)

    def determinants_of_stops(self) -> dict[str, list[int]]:
        """What the ids at which answers stop add to their key: those that S's generation config alone names, if any."""
        further_stops = self.chat.further_stops if self.named_stops else []
        return {"stops": further_stops} if further_stops else {}

    def load(self, model: Artifact) -> Engine:
        """An engine that scores with this model; the present engine if it has the model's weights."""
        if self._engine and self._loaded == model.key:
            return self._engine
        with CLOCK.counting("load"):
            self._start_loading(model)
            return self._open(model, self._load_as_stored(model).requires_grad_(False), self.config)

    def load_to_train(self, spec: StepSpec) -> Engine:
        """An engine with a new optimiser, at the bytes of the step's start.

        If the start is the model in memory, it stays there: nothing is read.
        """
        with CLOCK.counting("load"):
            adapter = bind(tune, spec.config.tune)()
            if adapter:
                return self._load_adapted(adapter, spec)
            engine = self._engine if self._loaded == spec.start.key and not self._adapter else None
            if engine and engine.trains and engine.states == spec.config.optim.states:
                engine.renew(spec.config.optim)
                return engine
            if engine and not engine.trains and self._is_exact and isinstance(engine, Plain):
                return self._open_engine(engine.scorer.requires_grad_(True), spec.start, spec.config)
            self._start_loading(spec.start)
            return self._open(spec.start, self._load_as_stored(spec.start).requires_grad_(True), spec.config)

    def _load_adapted(self, adapter: tune.Adapter, spec: StepSpec) -> Engine:
        self.store.join()  # the start's folder may have an adapter
        adapted = adapters.spec_for(adapter, spec.start, spec.history)
        self._start_loading(*{spec.start, adapted.base})
        self._adapter = adapted
        return self._open(spec.start, adapters.load(adapted, spec.config.seed, self.loading), spec.config)

    @property
    def loading(self) -> adapters.Loading:
        """How the base of an adapter is loaded."""
        dtype = hub.DTYPES[self.config.precision]
        return adapters.Loading(self.config.model.trust_remote_code, dtype, self.device)

    def load_beside(self, model: Artifact) -> Scorer:
        """A frozen scorer with this model, beside the present engine, as that one computes."""
        self.store.join()
        if distributed.is_main():
            verify(model)
        distributed.barrier()
        loaded = self._load_as_stored(model).requires_grad_(False).eval()
        scorer = Scorer(loaded, self.config.launch.attention, longest=None)
        layers.prepare(loaded, self.config.launch, self.device)
        hub.cast(scorer, self.device, hub.DTYPES[self.config.precision])
        return scorer

    def _load_as_stored(self, model: Artifact) -> PreTrainedModel:
        """The model for an engine, which casts it."""
        return hub.load(model.folder, self.config.model.trust_remote_code, as_stored=True)

    def load_verified(self, model: Artifact) -> PreTrainedModel:
        """The model in fp32 on the CPU, without an engine; the present engine stays as it is.

        Raises UserError if the folder no longer holds the weights that the key names.
        """
        self.store.join()
        verify(model)
        return hub.load(model.folder, trust_remote_code=self.config.model.trust_remote_code)

    def _start_loading(self, *models: Artifact) -> None:
        self.release()
        self.store.join()
        if distributed.is_main():
            for model in models:
                verify(model)
        distributed.barrier()

    def _open(self, model: Artifact, loaded: PreTrainedModel, config: Config) -> Engine:
        scorer = Scorer(loaded, self.config.launch.attention, longest=None)
        self._kernels = layers.prepare(loaded, self.config.launch, self.device)
        self._is_exact = loaded.dtype == torch.bfloat16 or config.precision == "fp32"
        return self._open_engine(scorer, model, config)

    def _open_engine(self, scorer: Scorer, model: Artifact, config: Config) -> Engine:
        self._engine = open_engine(scorer, config.optim, config.precision, config.deepspeed, self.device)
        self._loaded = model.key
        self._check(scorer, config)
        if self._reported_backend != scorer.backend:
            self._reported_backend = scorer.backend
            launch = self.config.launch
            tell(
                f"attention: {scorer.backend} (launch.attention={launch.attention}); "
                f"kernels of the layers: {self._kernels} (launch.kernels={launch.kernels})"
            )
        return self._engine

    def _check(self, scorer: Scorer, config: Config) -> None:
        """Check the scorer where it runs, once per architecture and backend, at lengths that the data can have."""
        kind = (scorer.model.config.to_json_string(), scorer.backend, config.precision)
        if kind in self._checked:
            return
        self._checked.add(kind)
        longest, name = config.data.max_tokens, type(scorer.model).__name__
        if config.deepspeed.stage == 3 and distributed.world_size() > 1 and scorer.longest_packed < longest:
            raise UserError(  # the ranks would run different numbers of forward passes, and wait for each other
                f"{name} has other rotary frequencies for each length above {scorer.longest_packed} tokens, which "
                f"deepspeed=zero3 cannot do: set data.max_tokens={scorer.longest_packed}, or use deepspeed=zero2"
            )
        check_packing(scorer, longest)

    def release(self) -> None:
        """Unload the model in memory."""
        if self._engine:
            self._engine.close()
        self._engine = self._loaded = self._adapter = None

    def save(self, engine: Engine, folder: Path, key: str) -> None:
        """Write the trained weights as a Hugging Face folder. From here on they are the model of this key.

        The weights in memory are rounded as those in the file, so that they have its bits.
        """
        assert engine is self._engine, "another model was loaded while this one was trained"
        with CLOCK.counting("save"):
            self._save(engine, folder)
        self._loaded = None if self._adapter else key

    def _save(self, engine: Engine, folder: Path) -> None:
        dtype = hub.DTYPES[self.config.save_dtype]
        if not self._adapter:
            engine.round_to(dtype)
        model, share = self._merged(engine, folder) if self._adapter else (engine.scorer.model, engine.share(dtype))
        tokenizer = as_trained(self.tokenizer, self.config.data.template)
        share = {name.removeprefix("model."): tensor.detach().to(dtype) for name, tensor in share.items()}
        hub.save_shares(model, share, tokenizer, folder, self.chat.stops)

    def _merged(self, engine: Engine, folder: Path) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
        """The base with the trained adapter merged into it, and its weights by the scorer's names, all on rank 0."""
        assert self._adapter
        trained = {name.removeprefix("model."): tensor for name, tensor in engine.weights().items()}
        if not distributed.is_main():
            return engine.scorer.model, {}
        remote = self.config.model.trust_remote_code
        model = adapters.save_and_merge(self._adapter, trained, folder, remote)
        return model, {f"model.{name}": param for name, param in model.named_parameters()}

    def weights_hash(self, model: Artifact) -> str | None:
        """The content hash of a model's weights as they are stored; only rank 0 has it."""
        self.store.join()
        return hub.fingerprint_files(model.folder) if distributed.is_main() else None

    def logprobs_of(self, model: Artifact, tables: list[list[TokenPair]]) -> list[np.ndarray]:
        """The log-probs of several tables of rows under a model. It is loaded once, if the store lacks any of them."""
        return [self.logprobs(model, rows) for rows in tables]

    def logprobs(self, model: Artifact, rows: list[TokenPair]) -> np.ndarray:
        """Summed response log-probs [N, 2] (float32, nats) of rows under a model: read, or computed and stored.

        A model with a tokenizer of its own reads the same texts in its own tokens. Raises UserError if a stored table
        was changed.
        """
        rows = self.as_read_by(model, rows)

        def build(folder: Path) -> None:
            module, budget = self.load(model).module, scoring_budget(self.config.launch)
            bar = Progress(len(rows), "log-probs")
            with bar, explained("in the log-probs", budget), CLOCK.counting("reference"):
                began = time.monotonic()
                logps_N2 = score(module, rows, budget, bar.advance)
                self.scored += (sum(map(tokens_of, rows)), time.monotonic() - began)
            if distributed.is_main():
                logprob_table.write(folder / "logprobs.parquet", rows, logps_N2)

        artifact = self.store.make("logprobs", self._determinants(model, rows), build)
        logps_N2 = logprob_table.read(artifact.folder / "logprobs.parquet")
        if damaged(artifact):
            self._name_wrong_rows(model, rows, logps_N2, artifact)
        return logps_N2

    def has_logprobs(self, model: Artifact, rows: list[TokenPair]) -> bool:
        """Whether the store has the log-probs of these rows under this model."""
        return self.store.holds("logprobs", self._determinants(model, self.as_read_by(model, rows)))

    def _determinants(self, model: Artifact, rows: list[TokenPair]) -> dict[str, Any]:
        return {"weights": model.key, "rows": content_hash(rows), **self.numerics.of_logprobs()}

    def as_read_by(self, model: Artifact, rows: list[TokenPair]) -> list[TokenPair]:
        """The rows in the tokens that the model reads: its own if it is an external reference."""
        foreign = self.foreign.get(model.key)
        return [foreign[row.id] for row in rows] if foreign else rows

    def _name_wrong_rows(self, model: Artifact, rows: list[TokenPair], logps_N2: np.ndarray, found: Artifact) -> None:
        """Raise a UserError that names the rows whose stored log-probs are not the model's."""
        fresh_N2 = score(self.load(model).module, rows, scoring_budget(self.config.launch))
        both = zip(rows, fresh_N2, logps_N2, strict=False)  # the table may be another one, with fewer rows
        wrong = [row.id for row, ours, theirs in both if (ours != theirs).any()]
        raise UserError(
            f"{found.folder} has changed since it was written; its model gives other log-probs for "
            f"{', '.join(wrong[:5]) or 'no row'}; remove the folder and start again"
        )

    def audit(self, model: Artifact, rows: list[TokenPair], logps_N2: np.ndarray) -> None:
        """Score a fixed sample of rows again with the model's own forward pass, one sequence at a time.

        Raises UserError, with the row's id, if a log-prob differs from the table by more than rounding explains.
        """
        rows = self.as_read_by(model, rows)
        sample = np.random.default_rng(len(rows)).choice(len(rows), min(NUM_AUDITED, len(rows)), replace=False)
        scorer = self.load(model).scorer
        for row, stored in zip([rows[i] for i in sample], logps_N2[sample], strict=True):
            with torch.no_grad(), CLOCK.counting("reference"):
                fresh = np.array([float(logp) for logp in naive_logprobs(scorer.model, row)])
            if exceeds_rounding(stored[None], fresh[None], [row], scorer.head.weight.dtype):
                raise UserError(
                    f"the reference log-probs of row {row.id} are {stored.tolist()}, but its model gives "
                    f"{fresh.tolist()}: the stored numbers are not this model's; remove them and start again"
                )


def verify(model: Artifact) -> None:
    """Raise UserError unless the folder still holds the weights that the key names."""
    if model.is_stored:
        check(model)
    elif hub.fingerprint(model.folder) != model.key:
        raise UserError(f"{model.folder} has changed since this run began; start again to use the new weights")
