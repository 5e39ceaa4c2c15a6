"""The typed configuration and its strict loading.

Hydra composes YAML; all other code reads these dataclasses. The open axes (split, score, reference, loss, tune,
evaluate) stay dictionaries of `name:` and settings, which sdpo/binding.py binds to a function.
"""

import json
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdpo.errors import UserError
from sdpo.fields import at_least, check, one_of, sentence, share

Settings = dict[str, Any]


# Tokens of a pack if launch.tokens_per_pack is null, by device: of log-probs alone, and of training.
SCORED = {"cpu": 8192, "cuda": 16384}
TRAINED = {"cpu": 8192, "cuda": 32768}
TEMPLATES = (None, "alpaca", "zephyr", "chatml", "plain")  # None: the tokenizer's own


@dataclass
class Optim:
    lr: float = at_least(0, 5e-7)
    schedule: str = one_of("linear", "cosine", "constant")  # of the learning rate after the warm-up
    warmup: float = share(0.1)  # share of a step's updates
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = at_least(0, 0.0)
    clip: float = at_least(0, 1.0)  # largest gradient norm; 0: no clipping
    epochs: int = at_least(1, 1)  # passes over a chunk
    pairs_per_update: int = at_least(1, 32)  # over all ranks
    moments: str = one_of("reset", "carry")  # of AdamW; carry: those of the previous step
    schedule_over: str = one_of("step", "run")  # what one warm-up and decay covers
    states: str = one_of("fp32", "8bit", "host", "auto")  # AdamW's moments, and where they and the masters are kept


@dataclass
class LabModel:
    width: int = at_least(1, 64)
    layers: int = at_least(1, 3)
    heads: int = at_least(1, 4)


@dataclass
class Model:
    name: str = one_of("lab", "local", "hub", default=MISSING)
    path: str | None = None  # a folder (local) or a repository name (hub)
    revision: str | None = None
    trust_remote_code: bool = False
    template: str | None = one_of(*TEMPLATES)  # default of data.template
    parameters: float | None = None  # their number, for a plan without the model's files
    lr: float = at_least(0, 5e-7)  # default of optim.lr
    device: str = one_of("auto", "cpu", "cuda")  # default of launch.device
    seed: int = at_least(0, 0)  # of the laboratory's S
    lab: LabModel = field(default_factory=LabModel)
    sft: Optim | None = None  # how the laboratory's S is trained, as step 0


@dataclass
class LabSource:
    sampler: str = one_of("teacher", "on_policy", "edits")
    num_pairs: int = at_least(0, 1000)  # 0: the source is left out
    temperature: float = at_least(0, 0.0)  # of the Bradley-Terry judge; 0: a judge without noise
    filler_bonus: float = 0.0  # reward that the judge adds per filler character
    flipped: float = share(0.0)  # share of pairs whose label is flipped
    families: list[str] = field(default_factory=list)  # empty: all


@dataclass
class LabData:
    num_demonstrations: int = at_least(1, 20000)
    num_held_out: int = at_least(1, 300)  # pairs per source
    num_prompts: int = at_least(4, 256)  # prompts of the gold evaluation
    num_samples: int = at_least(1, 4)  # answers per prompt
    num_items: int = at_least(1, 250)  # multiple-choice items per family
    prompts: str = one_of("test", "dev")  # the prompts on which models are evaluated
    sources: dict[str, LabSource] = field(default_factory=dict)


@dataclass
class Nominal:
    """The size of a source, for a plan on a machine without its data."""

    pairs: int = at_least(1, MISSING)
    tokens: int = at_least(1, MISSING)  # per pair, as many as pass through the network


@dataclass
class Data:
    name: str = one_of("lab", "local", "hub", default=MISSING)
    train: list[str] = field(default_factory=list)  # files (local); `name`, `name:split` or `name/config:split` (hub)
    held_out: list[str] = field(default_factory=list)
    held_out_share: float = share(0.05)  # share of prompts to hold out if held_out is empty
    held_out_sets: dict[str, list[str]] = field(default_factory=dict)  # name -> files or data sets, measured apart
    revisions: dict[str, str] = field(default_factory=dict)  # hub: data set name -> revision
    nominal: dict[str, Nominal] = field(default_factory=dict)  # hub: source -> size, for a plan without the data
    columns: dict[str, str] = field(default_factory=dict)  # our column name -> the file's, for unknown layouts
    source_from: str = one_of("file", "row")
    on_bad_row: str = one_of("error", "skip")
    template: str | None = one_of(*TEMPLATES)
    template_date: str = "2024-07-26"  # ISO: the day on which templates that read the clock are rendered
    limit: int = at_least(0, 0)  # read only so many rows, the first, of every file or data set; 0: all
    held_out_limit: int = at_least(0, 0)  # the same for those that are held out; 0: limit
    max_tokens: int = at_least(2, 1024)
    on_long: str = one_of("error", "drop", "truncate_prompt", "truncate_response")
    seed: int = at_least(0, 0)  # of the held-out share and the laboratory's pairs
    lab: LabData = field(default_factory=LabData)


@dataclass
class RoundsEndpoint:
    url: str  # up to and without /chat/completions
    model_name: str
    price_in: float  # dollars per million tokens
    price_out: float
    max_cost: float  # dollars that may ever be spent on this model, by all runs that share the store
    key_variable: str = "OPENAI_API_KEY"  # the environment variable that holds the key
    max_tokens: int = at_least(1, 1024)  # of a verdict
    concurrency: int = at_least(1, 8)  # requests at a time
    timeout: float = at_least(0.01, 120.0)  # seconds of silence


@dataclass
class Rounds:
    name: str = one_of("given", "on_policy")  # the pairs of a step: the data's own, or the newest model's answers
    answers: int = at_least(2, 4)  # per prompt; the best one is compared with the worst one
    temperature: float = at_least(0.01, 1.0)
    max_new_tokens: int = at_least(1, 512)
    batch_size: int = at_least(1, 64)
    share: float = share(1.0)  # of a chunk's prompts that are answered; the other pairs are the given ones
    judge: str = one_of("reward_model", "gold", "endpoint")  # gold: the laboratory's true reward
    path: str | None = None  # of the reward model: a folder or a repository name
    revision: str | None = None
    template: str | None = one_of(*TEMPLATES)  # of the reward model; null: its tokenizer's own
    endpoint: RoundsEndpoint | None = None  # a language model that compares the answers, each two in both orders


@dataclass
class Probe:
    num_pairs: int = at_least(1, 64)  # of every chunk, which every model of the run scores
    every: int = at_least(0, 0)  # updates between two measurements of the policy inside a step; 0: none
    file: str | None = None  # of prompts that the policy answers while it trains
    answers_every: int = at_least(1, 50)  # updates between two times
    max_new_tokens: int = at_least(1, 64)  # of each answer


@dataclass
class Deepspeed:
    stage: int | None = one_of(None, 1, 2, 3)  # the ZeRO stage; null: plain PyTorch
    offload: bool = False  # keep optimiser state (at stage 3 weights too) in host memory
    config: Any = field(default_factory=dict)  # DeepSpeed's own settings, or the JSON file that holds them


@dataclass
class Launch:
    ranks: int = at_least(1, 1)  # on all nodes together
    nodes: int = at_least(1, 1)
    any_ranks: bool = False  # take steps, finished or begun, whatever the number of ranks that made them
    memory: float | None = None  # GB of each GPU, for plans and states=auto; null: the card's, or 80 if there is none
    threads: int = at_least(1, 1)  # per rank
    device: str = one_of("auto", "cpu", "cuda")
    attention: str = one_of("auto", "sdpa", "varlen", "flex", "plain")
    kernels: str = one_of("auto", "liger", "plain")  # of norms, rotary embedding and activations in the layers
    compile: bool = False  # compile the layers with torch.compile
    tokens_per_pack: int | None = at_least(1, None)  # unique tokens in a micro-batch, at most; null: by device
    recompute_activations: bool = False  # recompute them in the backward pass to save memory
    checkpoint_minutes: float = at_least(0, 10.0)  # minutes between checkpoints inside a step
    timeout_minutes: float = at_least(0.01, 30.0)  # after which a rank that does not answer ends the run


@dataclass
class Record:
    wandb: bool = False
    project: str = "sdpo"
    mode: str = one_of("offline", "online")
    every: int = at_least(1, 1)  # updates between two logged lines


@dataclass
class Config:
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    split: Settings = field(default_factory=dict)
    score: Settings = field(default_factory=dict)
    reference: Settings = field(default_factory=dict)
    start: str = one_of("previous", "initial")
    loss: Settings = field(default_factory=dict)
    tune: Settings = field(default_factory=dict)
    optim: Optim = field(default_factory=Optim)
    deepspeed: Deepspeed = field(default_factory=Deepspeed)
    precision: str = one_of("fp32", "bf16")
    save_dtype: str = one_of("fp32", "bf16")  # of the saved weights of M_t
    evaluate: dict[str, Settings] = field(default_factory=dict)
    rounds: Rounds = field(default_factory=Rounds)
    probe: Probe = field(default_factory=Probe)
    record: Record = field(default_factory=Record)
    launch: Launch = field(default_factory=Launch)
    seed: int = at_least(0, 0)  # of all that a run draws
    T: int = at_least(1, 2)  # number of steps that arms use; a split has its own num_chunks
    steps: dict[int, Settings] = field(default_factory=dict)  # overrides per step
    plan: bool = False


PER_STEP = ("optim", "loss", "reference", "start")  # the keys that steps.<t> may override


def from_composed(composed: DictConfig | ListConfig | dict) -> Config:
    """Return the typed configuration.

    Raises UserError for an unknown key (also one added with ++), a wrong type or value, and a missing value.
    """
    try:
        if not isinstance(composed, DictConfig):
            composed = OmegaConf.create(composed)
        if missing := sorted(OmegaConf.missing_keys(composed)):
            raise UserError(f"{missing[0]} has no value; set {missing[0]}=...")
        given = cast(Settings, OmegaConf.to_container(composed, resolve=True))
        given["steps"] = {_step_number(t): changes for t, changes in (given.get("steps") or {}).items()}
        config = cast(Config, OmegaConf.to_object(OmegaConf.merge(_schema(), given)))
    except OmegaConfBaseException as error:
        raise UserError(sentence(error)) from error
    check(config)
    config.deepspeed.config = _read_if_file(config.deepspeed.config)
    if config.model.name != "lab" and config.model.path is None:
        raise UserError("model.path has no value; set model.path=...")
    if config.data.name != "lab" and not config.data.train:
        raise UserError("data.train has no value; set data.train=[...]")
    for t in config.steps:
        for_step(config, t)
    return config


def load(path: Path) -> Config:
    """Return the configuration in a run folder's config.yaml."""
    return from_composed(OmegaConf.load(path))


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as text, which `load` reads back; equal configurations give equal text."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def for_step(config: Config, t: int) -> Config:
    """Return the configuration with the overrides of step `t` merged in. Raises UserError if they are not valid."""
    changes = config.steps.get(t)
    if not changes:
        return config
    if extra := set(changes) - set(PER_STEP):
        raise UserError(f"steps.{t}.{min(extra)}: a step can change {', '.join(PER_STEP)}, nothing else")
    if changes.get("loss", {}).get("name", config.loss.get("name")) != config.loss.get("name"):
        config = replace(config, loss={})  # another loss has all its settings from the step
    try:
        merged = cast(Config, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config), changes)))
    except OmegaConfBaseException as error:
        raise UserError(f"steps.{t}: {sentence(error)}") from error
    check(merged, f"steps.{t}.")
    return merged


def _read_if_file(settings: Any) -> Settings:
    """DeepSpeed's settings; read if they are the name of a JSON file, so that config.yaml in a run folder has them."""
    if settings is None:
        return {}
    if isinstance(settings, str):
        try:
            settings = json.loads(Path(settings).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"deepspeed.config={settings} cannot be read as JSON: {error}") from error
    if not isinstance(settings, dict):
        raise UserError("deepspeed.config is neither a mapping nor the name of a JSON file that holds one")
    return settings


@cache
def _schema() -> DictConfig:
    """The Config class as a typed node; all callers share it, and merging copies it."""
    return OmegaConf.structured(Config)


def _step_number(key: Any) -> int:
    if not str(key).isdigit() or int(key) < 1:
        raise UserError(f"steps.{key}: steps are counted from 1, as in steps.2.optim.lr=1e-6")
    return int(key)
