"""The one model in memory: it scores rows, trains a step, and is put away before another one is taken up.

Log-probabilities are artifacts: what was scored once under some weights is read as numbers ever after.
Shape suffixes: N rows; columns are the chosen and the rejected response.
"""

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdpo.binding import choose
from sdpo.config import Config
from sdpo.data.tokenize import TokenPair, content_hash
from sdpo.launch import local as launch
from sdpo.metrics import progress, tell
from sdpo.model import adapters, hub
from sdpo.model.engine import Engine, open_engine
from sdpo.model.logprobs import Scorer, naive_logprobs, score
from sdpo.model.memory import explained
from sdpo.model.packing import tokens_of
from sdpo.store import Artifact, Store, check, damaged
from sdpo.variants import tune

NUM_AUDITED = 4  # rows of every log-prob table that are scored anew when a step reads it
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}  # relative, between the packed pass and the model's own forward


class Workbench:
    """Holds at most one model, as an engine that can score and train."""

    def __init__(self, config: Config, store: Store, tokenizer: PreTrainedTokenizerBase):
        self.config, self.store, self.tokenizer = config, store, tokenizer
        self.device = launch.device(config.launch.device)
        self.foreign: dict[str, dict[str, TokenPair]] = {}  # by model key: rows in that model's own tokens
        self.scored = np.zeros(2)  # tokens, and seconds, of all passes for log-probs so far
        self._attention = ""  # what was told last
        self._engine: Engine | None = None
        self._held: str | None = None  # the key of the weights in memory
        self._place: adapters.Place | None = None  # of the adapter, where one is trained

    def hold(self, model: Artifact, config: Config | None = None) -> Engine:
        """Take a model up, to score alone; with `config`, freshly from its bytes, with a new optimiser, for a step."""
        if config is None and self._held == model.key:
            return self._engine
        self.release()
        if launch.is_main():
            verify(model)
        launch.barrier()
        adapter = choose(tune, config.tune)() if config else None
        if adapter:
            self._place = adapters.place(adapter, model, self.find)
            loaded = adapters.load(self._place, config)
        else:
            loaded = self._load(model).requires_grad_(config is not None)
        scorer = Scorer(loaded, self.config.launch.attention)
        if self.config.launch.compile:
            scorer.compile_decoder()
        self._engine = open_engine(scorer, config or self.config, self.device)
        self._held = model.key
        if self._attention != scorer.backend:
            self._attention = scorer.backend
            tell(f"attention: {self._attention} (launch.attention={self.config.launch.attention})")
        return self._engine

    def host_model(self, model: Artifact) -> torch.nn.Module:
        """A plain copy of a (small) model outside the engine, to sample from."""
        verify(model)
        return self._load(model)

    def _load(self, model: Artifact) -> PreTrainedModel:
        return hub.load(model.folder, trust_remote_code=self.config.model.trust_remote_code)

    def release(self) -> None:
        if self._engine:
            self._engine.close()
        self._engine = self._held = self._place = None

    def find(self, key: str) -> Artifact:
        """The model of a key: made here, or S from elsewhere. ValueError where it is neither."""
        made, given = next(self.store.root.glob(f"*/{key[:16]}/manifest.json"), None), self.config.model
        folder = made.parent if made else hub.locate(given.path, given.revision, given.name == "hub")
        found = Artifact(key, folder, reused=True)
        verify(found)
        return found

    def save(self, folder: Path, key: str) -> None:
        """Write the weights in memory as a Hugging Face folder; from here on they are the model of this key."""
        model, state = self._engine.scorer.model, self._engine.weights()
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        if launch.is_main():
            if self._place:
                model = adapters.finish(self._place, state, folder, self.config)
                state = dict(model.named_parameters())
            dtype = hub.DTYPES[self.config.save_dtype]
            hub.save(model, {name: tensor.to(dtype) for name, tensor in state.items()}, self.tokenizer, folder)
        # What was rounded or merged on the way to disk is not what memory holds.
        self._held = key if self.config.save_dtype == "fp32" and not self._place else None

    def logprobs(self, model: Artifact, rows: list[TokenPair]) -> np.ndarray:
        """Summed response log-probs [N, 2] (float32, nats) of rows under a model: read, or computed and kept.

        A model that came with a tokenizer of its own reads the same texts in its own tokens.
        """
        rows = self.as_read_by(model, rows)
        determinants = {
            "weights": model.key,
            "rows": content_hash(rows),
            "precision": self.config.precision,
            "attention": self.config.launch.attention,
            "compile": self.config.launch.compile,
            "device": self.device.type,
        }

        def build(folder: Path) -> None:
            module, budget = self.hold(model).module, self.config.launch.tokens_per_pack
            bar = progress(len(rows), "log-probs", quiet=not launch.is_main())
            with bar, explained("in the log-probs", budget):
                began = time.monotonic()
                logps_N2 = score(module, rows, budget, bar.advance)
                self.scored += (sum(map(tokens_of, rows)), time.monotonic() - began)
            if launch.is_main():
                write_table(folder / "logprobs.parquet", rows, logps_N2)

        artifact = self.store.make("logprobs", determinants, build)
        logps_N2 = read_table(artifact.folder / "logprobs.parquet")
        if damaged(artifact):
            self._name_wrong_rows(model, rows, logps_N2, artifact)
        return logps_N2

    def _name_wrong_rows(self, model: Artifact, rows: list[TokenPair], logps_N2: np.ndarray, found: Artifact) -> None:
        """ValueError for a table that is not what was written, with the rows whose numbers were changed."""
        fresh_N2 = score(self.hold(model).module, rows, self.config.launch.tokens_per_pack)
        wrong = [row.id for row, ours, theirs in zip(rows, fresh_N2, logps_N2, strict=True) if (ours != theirs).any()]
        raise ValueError(
            f"{found.folder} has changed since it was written; its model gives other log-probs for "
            f"{', '.join(wrong[:5]) or 'no row'}; remove the folder and start again"
        )

    def as_read_by(self, model: Artifact, rows: list[TokenPair]) -> list[TokenPair]:
        foreign = self.foreign.get(model.key)
        return [foreign[row.id] for row in rows] if foreign else rows

    def audit(self, model: Artifact, rows: list[TokenPair], logps_N2: np.ndarray) -> float:
        """Score a fixed sample of rows anew with the model's own forward pass, one sequence at a time.

        Returns the largest relative difference to the table; ValueError, with the row's id, above the tolerance.
        """
        rows = self.as_read_by(model, rows)
        sample = np.random.default_rng(len(rows)).choice(len(rows), min(NUM_AUDITED, len(rows)), replace=False)
        engine = self.hold(model)
        worst = 0.0
        for index in map(int, sample):
            with torch.no_grad():
                fresh = np.array([float(sum_) for sum_ in naive_logprobs(engine.scorer.model, rows[index])])
            error = float((np.abs(fresh - logps_N2[index]) / np.maximum(1.0, np.abs(fresh))).max())
            if not error <= TOLERANCE[self.config.precision]:
                raise ValueError(
                    f"the reference log-probs of row {rows[index].id} are {logps_N2[index].tolist()}, but its model "
                    f"gives {fresh.tolist()}: the stored numbers are not this model's; remove them and start again"
                )
            worst = max(worst, error)
        return worst


def write_table(path: Path, rows: list[TokenPair], logps_N2: np.ndarray) -> None:
    """Keep log-probs by row id."""
    columns = {"id": [row.id for row in rows], "chosen": logps_N2[:, 0], "rejected": logps_N2[:, 1]}
    pq.write_table(pa.table(columns), path)


def read_table(path: Path) -> np.ndarray:
    """Log-probs [N, 2] in the order of the rows they were written for."""
    table = pq.read_table(path)
    return np.stack([table["chosen"].to_numpy(), table["rejected"].to_numpy()], axis=1)


def verify(model: Artifact) -> None:
    """ValueError unless the folder still holds the weights that the key names."""
    if model.folder.name == model.key[:16]:  # an artifact of the store
        check(model)
    elif hub.fingerprint(model.folder) != model.key:
        raise ValueError(f"{model.folder} has changed since this run began; start again to use the new weights")
