"""The typed configuration, its strict loading, and choose(): from a name and settings to a function.

Hydra composes YAML; everything after that is these dataclasses. The open rooms (split, score, reference, loss,
tune, evaluate) stay dictionaries of `name:` plus keyword arguments, which `choose` binds to the room's function.
"""

import inspect
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, make_dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

Settings = dict[str, Any]


@dataclass
class Optim:
    lr: float = 5e-7
    schedule: str = "linear"  # linear | cosine | constant, after the warm-up
    warmup: float = 0.1  # share of a step's updates
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.0
    clip: float = 1.0  # largest gradient norm
    epochs: int = 1  # passes over a chunk
    pairs_per_update: int = 32  # over all ranks


@dataclass
class LabModel:
    width: int = 64
    layers: int = 3
    heads: int = 4


@dataclass
class Model:
    name: str = MISSING  # lab | local | hub
    path: str | None = None  # a folder (local) or a repository name (hub)
    revision: str | None = None
    trust_remote_code: bool = False
    seed: int = 0  # governs the laboratory's S
    lab: LabModel = field(default_factory=LabModel)
    sft: Optim | None = None  # where set, S is trained first, as step 0


@dataclass
class LabSource:
    sampler: str = "teacher"  # teacher | on_policy | edits
    num_pairs: int = 1000
    temperature: float = 0.0  # of the Bradley-Terry judge; 0 is the exact judge
    filler_bonus: float = 0.0  # what the judge adds per filler character
    flipped: float = 0.0  # share of pairs whose label is turned round
    families: list[str] = field(default_factory=list)  # empty: all


@dataclass
class LabData:
    num_demonstrations: int = 20000
    num_held_out: int = 300  # pairs per source
    num_prompts: int = 256  # prompts of the gold evaluation
    num_samples: int = 4  # answers per prompt
    prompts: str = "test"  # dev | test: which gold prompts the headline is measured on
    sources: dict[str, LabSource] = field(default_factory=dict)


@dataclass
class Data:
    name: str = MISSING  # lab | local | hub
    train: list[str] = field(default_factory=list)  # files (local); `name`, `name:split` or `name/config:split` (hub)
    held_out: list[str] = field(default_factory=list)
    held_out_share: float = 0.05  # share of prompts held out where no held_out is given
    revisions: dict[str, str] = field(default_factory=dict)  # hub: data set name -> revision
    columns: dict[str, str] = field(default_factory=dict)  # ours -> theirs, for unknown layouts
    source_from: str = "file"  # file | row
    on_bad_row: str = "error"  # error | skip
    template: str | None = None  # null: the tokenizer's own; or alpaca | zephyr | chatml | plain
    max_tokens: int = 1024
    on_long: str = "error"  # error | drop | truncate_prompt | truncate_response
    seed: int = 0  # governs the held-out share and the laboratory's pairs
    lab: LabData = field(default_factory=LabData)


@dataclass
class Deepspeed:
    stage: int | None = None  # null: plain PyTorch; else ZeRO stage 1, 2 or 3
    offload: bool = False  # optimiser state on the host


@dataclass
class Launch:
    ranks: int = 1
    threads: int = 1  # per rank
    device: str = "auto"  # auto | cpu | cuda
    tokens_per_pack: int = 8192  # micro-batches are cut by this many unique tokens
    checkpoint_minutes: float = 10.0  # between checkpoints inside a step


@dataclass
class Record:
    wandb: bool = False
    project: str = "sdpo"
    mode: str = "offline"  # offline | online
    every: int = 1  # updates between logged lines


@dataclass
class Config:
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    split: Settings = field(default_factory=dict)
    score: Settings = field(default_factory=dict)
    reference: Settings = field(default_factory=dict)
    start: str = "previous"  # previous | initial
    loss: Settings = field(default_factory=dict)
    tune: Settings = field(default_factory=dict)
    optim: Optim = field(default_factory=Optim)
    deepspeed: Deepspeed = field(default_factory=Deepspeed)
    precision: str = "fp32"  # fp32 | bf16
    save_dtype: str = "fp32"  # fp32 | bf16: how M_t is kept
    evaluate: dict[str, Settings] = field(default_factory=dict)
    record: Record = field(default_factory=Record)
    launch: Launch = field(default_factory=Launch)
    seed: int = 0  # governs order, random splits, adapters and sampling
    steps: dict[int, Settings] = field(default_factory=dict)  # per-step overrides
    plan: bool = False
