"""What no change of the code may change unnoticed: keys, splits, losses, and the layout of a run folder.

All of it hangs on a model made of integers, whose bytes are the same on every processor and with every library. The
golden values are in pins.py; whoever changes a number on purpose changes it there, and says so.
"""

import json
import math
import random
from functools import cache

import pins
import pyarrow.parquet as pq
import pytest
import torch
from conftest import byte_tokenizer, compose, read_lines
from omegaconf import OmegaConf
from safetensors.torch import save_file

from sdpo import stepwise
from sdpo.curriculum import build
from sdpo.data.preferences import prompt_key
from sdpo.data.prompts import Prompt
from sdpo.data.tokenize import content_hash
from sdpo.evals import decoding, kl, reward_model, suites
from sdpo.lab.exam import Exam
from sdpo.model import hub
from sdpo.plan import dry_run
from sdpo.run import folder as run_folder
from sdpo.store.artifacts import NUMERICS_VERSION, ReadOnly, Store, key_of
from sdpo.train.setup import prepare

SHAPE = {  # config.json, written without transformers, which would add its version
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
TOKENIZER = {  # tokenizer_config.json
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": "<pad>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "model_max_length": 512,
}
SIZES = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32), "gate": (48, 32), "up": (48, 32), "down": (32, 48)}
TRAINED = "split=easy_to_hard probe.every=2"  # the run whose folder is looked at
VOLATILE = ("torch", "transformers", "lm_eval", "tokenizer", "answers")  # libraries, and what floating point decides


def weights():
    """Quadratic sequences modulo a prime, over a power of two: exact in fp32, about as spread as at initialisation."""
    shapes = {"lm_head": (300, 32), "model.embed_tokens": (300, 32), "model.norm": (32,)}
    for layer in ("model.layers.0.", "model.layers.1."):
        shapes |= {f"{layer}{name}_layernorm": (32,) for name in ("input", "post_attention")}
        for name, shape in SIZES.items():
            shapes[f"{layer}{'self_attn' if len(name) == 1 else 'mlp'}.{name}_proj"] = shape
    tensors = {}
    for number, name in enumerate(sorted(shapes)):
        at = torch.arange(math.prod(shapes[name]))
        values = ((at * at * (2 * number + 3) + 1009 * at + 31 * number) % 1021 - 510).float() / 2048
        tensors[f"{name}.weight"] = (values + ("norm" in name)).reshape(shapes[name])
    return tensors


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the model, two sources of 16 rated pairs each, two prompts and a benchmark's file."""
    folder = tmp_path_factory.mktemp("pins")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    (folder / "model" / "config.json").write_text(json.dumps(SHAPE))
    save_file(weights(), folder / "model" / "model.safetensors", metadata={"format": "pt"})
    rng = random.Random(0)

    def words():
        return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(1, 7))) for _ in range(rng.randint(1, 3)))

    for source in "ab":
        pairs = [{"prompt": f"{words()} {n}", "chosen": words(), "rejected": words() + "."} for n in range(16)]
        rated = [pair | {"chosen_rating": 2.0 + n % 3, "rejected_rating": 1.0} for n, pair in enumerate(pairs)]
        (folder / f"{source}.jsonl").write_text("\n".join(map(json.dumps, rated)))
    (folder / "ask.txt").write_text("abc\nde\n")
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks" / "arc_challenge.test.jsonl").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def ask(place):
    """ask("KEY=VALUE KEY=VALUE ...") is the configuration of a run on the two sources, or of an experiment's."""
    base = ["model=local", f"model.path={place / 'model'}", "data=local", "data.template=plain", "optim.lr=3e-3"]
    base += [f"data.train=[{place / 'a.jsonl'},{place / 'b.jsonl'}]", "data.held_out_share=0.1"]
    base += ["optim.pairs_per_update=4"]

    @cache
    def settings(overrides):
        own = [] if overrides.startswith("experiment=") else base
        return compose("launch.device=cpu", *own, *overrides.split())

    return settings


class Asked(ReadOnly):
    """A store in which nothing is made: it remembers what it was asked for, and every value in it is empty."""

    def __init__(self, root):
        super().__init__(root)
        self.asked = []

    def make(self, kind, determinants, build, then=None):
        self.asked.append((kind, determinants))
        return super().make(kind, determinants, build, then)

    def holds(self, kind, determinants):
        self.asked.append((kind, determinants))
        return super().holds(kind, determinants)

    def make_json(self, kind, determinants, compute):
        self.asked.append((kind, determinants))
        return {}


def train(settings, folder):
    """A whole run with a store of its own beside its folder; returns (kind, determinants) of all that it asked for."""
    asked, make = [], Store.make

    def listening(self, kind, determinants, build, then=None):
        artifact = make(self, kind, determinants, build, then)
        self.join()
        asked.append((kind, determinants))
        assert artifact.key == key_of(kind, determinants) and artifact.folder.name == artifact.key[:16]
        manifest = json.loads((artifact.folder / "manifest.json").read_text())
        assert set(manifest) == {"kind", "key", "numerics", "files", *determinants}
        return artifact

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDPO_STORE", str(folder.with_name("store")))
        patch.setattr(Store, "make", listening)
        run_folder.Run(settings, folder, choices={"split": "x"}, arm="pinned").prepare()
        stepwise.run(settings, folder)
        run_folder.finish(folder, run_folder.stamp(settings))
    return asked


@pytest.fixture(scope="module")
def trained(place, ask, tmp_path_factory):
    """The folder of a run that leaves about everything, and what it asked its store for."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    evaluation = f"evaluate.generate.file={place / 'ask.txt'} evaluate.generate.max_new_tokens=4"
    return folder, train(ask(f"{TRAINED} evaluate=[preference,generate] {evaluation}"), folder)


@pytest.fixture(scope="module")
def asked(place, ask, tmp_path_factory):
    """What a store is asked for by all that the small run above leaves out."""
    store = Asked(tmp_path_factory.mktemp("asked"))
    inputs = prepare(ask(""), store)
    runner, initial, exam = inputs.runner, inputs.initial, Exam(["a", "b"], 2, [["c", "d", "e", "f"]])
    other = initial._replace(key="0" * 64)
    assert not runner.has_logprobs(initial, inputs.train.rows)
    suites.lab(other, initial, exam, runner)
    suites.lab(initial, initial, exam, runner)
    suites.h4(initial, runner, local=str(place / "benchmarks"), limit=2)
    suites.lm_eval(initial, runner, tasks=["arc_challenge"], num_fewshot=0, local=str(place / "benchmarks"))
    kl.kl_to_initial(other, initial, [Prompt(1, ["abc"], "asked")], decoding.Decoding(0.5, 4, 2, 7), runner)
    reward_model.rewards(
        {"path": str(place / "model"), "revision": None, "template": "plain"}, inputs.held_out.pairs, runner
    )
    for overrides in ("reference=average", "tune=lora tune.between=stack tune.quantize=4bit", "experiment=smoke"):
        by_name(ask(overrides), store)
    return store.asked


def by_name(settings, store):
    """The keys of the steps that a run would take, S's and those of its scores first, as far as its pairs are known."""
    prepared = dry_run.prepare(settings, store)
    planned = [
        *prepared.steps,
        *dry_run.plan_scoring_models(settings, prepared),
        *dry_run.plan_steps(settings, prepared),
    ]
    return [step.model.key for step in planned if not step.unknown]


def stable_keys(asked):
    """{what was asked for: its keys in order}, less what differs between machines and versions of libraries."""
    keys = {}
    for kind, determinants in asked:
        label = " ".join(filter(None, [kind, determinants.get("suite")]))
        stable = {name: None if name in VOLATILE else value for name, value in determinants.items()}
        keys.setdefault(label, set()).add(key_of(kind, stable))
    return {label: sorted(found) for label, found in keys.items()}


def names(value, prefix=""):
    """The dotted names of all in a JSON value; names that are data become stars, and lists stand for their items."""
    if isinstance(value, list):
        return set().union(*(names(item, prefix) for item in value))
    found = set()
    for key, inner in value.items() if isinstance(value, dict) else ():
        name = prefix + ("*" if key in ("a", "b") or "/" in key or len(key) == 64 else key)
        found |= {name} | names(inner, f"{name}.")
    return found


def layout(folder):
    """What a run folder and its store hold: {file or folder: the names in it}."""
    step = folder / "steps" / "1"
    own = [path.name for path in step.iterdir() if not any(word in path.name for word in ("config", "token"))]
    found = {
        "run": {str(path.relative_to(folder)) for path in folder.rglob("*")},
        "store": {path.name for path in folder.with_name("store").iterdir()},
        "steps/1": set(own),  # less what transformers writes
        "config.yaml": names(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))),
    }
    for name in ("manifest", "split", "data_report", "summary", "steps/1/train", "answers/decoding"):
        found[f"{name}.json"] = names(json.loads((folder / f"{name}.json").read_text()))
    for kind in ("train", "step", "eval", "answers"):
        found[f"metrics.jsonl, {kind}"] = names(read_lines(folder, kind))
    found["measures"] = {name for entry in read_lines(folder, "eval") for name in entry["eval"]}
    return {name: sorted(inner) for name, inner in found.items()}


def test_the_numerics_version_is_raised_on_purpose_only():
    """Raising it makes another artifact of everything that anyone has kept."""
    assert NUMERICS_VERSION == 6


def test_the_model_and_the_pairs_are_known_by_their_content(place, ask, tmp_path):
    inputs = prepare(ask(""), Store(tmp_path))
    assert hub.fingerprint(place / "model") == inputs.initial.key == pins.MODEL
    assert [inputs.train.ids[0], inputs.train.ids[-1], *inputs.held_out.ids] == pins.IDS
    assert prompt_key(inputs.train.pairs[0].prompt) == pins.PROMPT


@pytest.mark.parametrize("overrides", pins.STEPS)
def test_keys_of_steps(ask, overrides, tmp_path):
    assert by_name(ask(overrides), Asked(tmp_path)) == pins.STEPS[overrides]


@pytest.mark.parametrize("overrides", pins.SPLITS)
def test_hashes_of_chunks_and_of_their_tokens(ask, overrides, tmp_path):
    settings = ask(overrides)
    inputs = prepare(settings, Store(tmp_path))
    curriculum = build.build(inputs, settings, inputs.initial)
    found = [
        (receipt["hash"], content_hash(inputs.chunk(chunk).rows))
        for receipt, chunk in zip(curriculum.describe()["receipts"], curriculum.chunks, strict=True)
    ]
    assert [hash for pair in found for hash in pair] == pins.SPLITS[overrides]


def test_keys_of_what_a_run_makes(trained):
    _, asked = trained
    assert stable_keys(asked) == pins.MADE


def test_keys_of_what_other_runs_make(asked):
    assert stable_keys(asked) == pins.ASKED


def test_what_determines_an_artifact(trained, asked):
    found = {" ".join([kind, *sorted(determinants)]) for kind, determinants in [*trained[1], *asked]}
    assert sorted(found) == pins.DETERMINANTS


@pytest.mark.parametrize("overrides", pins.LOSSES)
def test_losses(trained, ask, overrides, tmp_path):
    """Log-probs of up to 200 nats are rounded to 8e-6 in fp32. A loss reads four, each with a slope of about beta / 2,
    0.05; so it is off by 1.6e-6 at most, its mean over four pairs by less. Processors were found to differ by 5e-7."""
    folder = trained[0]
    if overrides != TRAINED:
        folder = tmp_path / "run"
        train(ask(f"{overrides} evaluate=[preference]"), folder)
    found = [entry["loss"] for entry in read_lines(folder, "train")]
    assert found == pytest.approx(list(map(float, pins.LOSSES[overrides])), abs=2e-6)


def test_names_in_a_run_folder(trained):
    found = layout(trained[0])
    for name, expected in pins.NAMES.items():
        assert found.pop(name) == expected, name
    assert not found


@pytest.mark.parametrize("name", pins.COLUMNS)
def test_columns_of_tables(trained, name):
    assert pq.read_schema(trained[0] / name).names == pins.COLUMNS[name]
