"""The files in conf/: every option composes and binds, every function has its file, and what overrides what."""

import importlib
import inspect
import re
import shlex
import subprocess
import sys

import pytest
from conftest import CHECKOUT
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from sdpo import config, validate
from sdpo.binding import variants
from sdpo.errors import UserError
from sdpo.launch import help
from sdpo.run import folder as run_folder

CONF = str(CHECKOUT / "conf")
REAL = ["model=local", "model.path=m", "data=local", "data.train=[a.jsonl]"]
MODULES = {
    "split": "variants.split",
    "score": "variants.score",
    "reference": "variants.reference",
    "loss": "variants.loss",
    "tune": "variants.tune",
    "evaluate": "evals.suites",
}
SHARED = {
    "split": {"keep", "disjoint_prompts", "within"},
    "score": {"model"},
    "reference": {"placebo"},
}  # keys of every variant
FILLED = {"train": "[x]", "bound": "1", "of": "[{name: dpo, weight: 1, beta: 0.1}]"}  # what has no default, if not x
FILLED |= dict.fromkeys(("judge.price_in", "judge.price_out", "judge.max_cost"), "1")
FILLED |= dict.fromkeys(("endpoint.price_in", "endpoint.price_out", "endpoint.max_cost"), "1")
FILLED |= dict.fromkeys(("reward_bench.pairs", "results.files"), "[x]")
OPTIONS = [(group, option) for group in help.groups() for option in help.options(group)]


def composed(*overrides):
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("config", list(overrides))


def bound(*overrides):
    settings = config.from_composed(composed(*overrides))
    validate.check(settings)
    return settings


def hydra_settings(*overrides):
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=True).hydra


def arms(overrides, sweep=()):
    """The overrides of every run that a command asks for, seeds aside."""
    params = hydra_settings(*overrides).sweeper.params or {}
    parsed = [*(f"{key}={value}" for key, value in params.items() if key != "seed"), *overrides, *sweep]
    return BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(parsed), None)[0]


def covering(asked):
    """Of the runs of a sweep those that set something that no run before them sets."""
    seen = set()
    for run in asked:
        if not seen.issuperset(run):
            yield run
        seen.update(run)


def blanks(written, prefix=""):
    """The keys of a file that have no value."""
    for key, value in written.items():
        if value == "???":
            yield prefix + key
        elif isinstance(value, dict):
            yield from blanks(value, f"{prefix}{key}.")


@pytest.mark.parametrize(("group", "option"), [pair for pair in OPTIONS if pair[0] != "experiment"])
def test_every_option_composes_and_binds(group, option):
    blank = list(blanks(OmegaConf.to_container(OmegaConf.load(CHECKOUT / "conf" / group / f"{option}.yaml"))))
    choice = f"{group}=[{option}]" if group == "evaluate" else f"{group}={option}"
    lab = group == "arm" or option.endswith("lab")
    bound(
        *([] if lab else REAL),
        choice,
        *(f"{group}.{key}={FILLED.get(key, 'x')}" for key in blank),
    )


@pytest.mark.parametrize(
    "which", [slice(0, 1), pytest.param(slice(1, None), marks=pytest.mark.slow)], ids=["first", "rest"]
)
@pytest.mark.parametrize("experiment", help.options("experiment"))
def test_the_runs_of_every_experiment_compose_and_bind(experiment, which):
    asked = arms([f"experiment={experiment}"])
    for run in list(covering(asked))[which]:
        settings = composed(*run)
        if settings.model.name != "lab" and not settings.model.path:
            settings.model.path = "x"  # what only the user knows
            settings.data.train = settings.data.train or ["x"]
        validate.check(config.from_composed(settings))
    contrasts = hydra_settings(f"experiment={experiment}").launcher.contrasts
    assert {arm for pair in contrasts.values() for arm in pair} <= set(run_folder.labels(asked)) and len(contrasts) <= 8


def test_an_arm_is_known_by_its_name_without_its_folder():
    names = [option.rpartition("/")[2] for option in help.options("arm")]
    assert len(set(names)) == len(names) > 0


def test_the_real_study_reads_the_folders_that_the_environment_names(monkeypatch):
    for name in ("SDPO_REAL_DATA", "SDPO_REAL_MODEL"):
        monkeypatch.delenv(name, raising=False)
    public = composed("experiment=real/core")
    assert (public.data.name, public.model.path) == ("hub", "HuggingFaceTB/SmolLM2-135M-Instruct")
    monkeypatch.setenv("SDPO_REAL_DATA", "/given")
    monkeypatch.setenv("SDPO_REAL_MODEL", "/a/model")
    given = composed("experiment=real/core")
    assert (given.data.name, given.model.path) == ("local", "/a/model")
    assert given.data.train[0] == "/given/pairs/step1_easy.train.jsonl" and len(given.data.held_out) == 3


@pytest.mark.parametrize("axis", MODULES)
def test_every_variant_has_a_file_with_its_keywords(axis):
    module = importlib.import_module(f"sdpo.{MODULES[axis]}")
    assert sorted(variants(module)) == help.options(axis)
    for name, function in variants(module).items():
        written = OmegaConf.load(CHECKOUT / "conf" / axis / f"{name}.yaml")
        written = written[name] if axis == "evaluate" else written
        keywords = {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
        assert written.name == name and keywords <= set(written) - {"name"} <= keywords | SHARED.get(axis, set())


def test_arm_goes_before_experiment_before_config_and_the_command_line_before_all(tmp_path):
    experiment = "defaults: [{override /loss: ipo}, {override /split: random}]\noptim: {lr: 2, clip: 2}\nseed: 2"
    arm = "defaults: [{override /split: all_at_once}]\noptim: {lr: 3}"
    for group, text in {"experiment": experiment, "arm": arm}.items():
        (tmp_path / group).mkdir()
        (tmp_path / group / "mine.yaml").write_text(f"# @package _global_\n{text}")
    chosen = [f"hydra.searchpath=[file://{tmp_path}]", *REAL, "experiment=mine", "arm=mine"]
    settings = bound(*chosen)
    assert (settings.loss["name"], settings.split["name"]) == ("ipo", "all_at_once")
    assert (settings.seed, settings.optim.clip, settings.optim.lr) == (2, 2, 3)
    settings = bound(*chosen, "split=by_source", "optim.lr=4", "seed=0")
    assert (settings.split["name"], settings.optim.lr, settings.seed) == ("by_source", 4, 0)


def test_help_fits_a_screen_and_explains_every_axis():
    screen = help.show([]).splitlines()
    assert len(screen) <= 50 and max(map(len, screen)) <= 110
    for group in help.groups():
        heads = [line for line in help.show([group]).splitlines() if not line.startswith(" ")]
        assert [head.split()[0] for head in heads] == help.options(group)
        assert all(re.fullmatch(r"\S+ +\S.* .*\.", head) and "@" not in head for head in heads)
    assert "lr: ${model.lr}" in help.show(["optim"])
    with pytest.raises(UserError, match="no help on 'los'; there is help on model, data"):
        help.show(["los"])


def test_the_configuration_is_shown_without_importing_anything_heavy():
    command = [sys.executable, "-X", "importtime", "train.py", *REAL, "--cfg", "job"]
    shown = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert "pairs_per_update: 32" in shown.stdout
    assert not re.search(r"\| +(torch|transformers|numpy|wandb)$", shown.stderr, re.MULTILINE)


def test_the_table_of_options_is_the_one_that_help_makes():
    assert (CHECKOUT / "docs" / "options.md").read_text() == help.markdown() + "\n"


def readme_commands():
    pages = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages).replace("\\\n", " ")
    found = re.findall(r"`(python train\.py (?!--help).*?)`|^ +(python train\.py(?!.* --help).*)", text, re.MULTILINE)
    return list(dict.fromkeys(re.sub(r" +#.*", "", inline or line) for inline, line in found))


@pytest.mark.parametrize("command", readme_commands())
def test_every_command_of_the_readme_composes(command):
    words = [word for word in shlex.split(command, comments=True)[2:] if word != "-m"]
    sweep = [word for word in words if OverridesParser.create().parse_override(word).is_sweep_override()]
    for run in covering(arms([word for word in words if word not in sweep], sweep)):
        bound(*run)
