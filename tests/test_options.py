"""Every option trains: each split with each reference in this process, and all options of all groups through train.py.

Models and data of the Hub, and external references, are replaced by stand-ins that are made from the toy.
"""

import functools
import json
import os
import shutil
import sys
from dataclasses import replace

import forked
import pytest
import torch
from conftest import CONF, REAL_DATA, TINY, byte_tokenizer, compose, random_model, read_lines
from omegaconf import OmegaConf
from transformers import LlamaConfig, LlamaForSequenceClassification

import train as entry_point
from sdpo import stepwise, validate
from sdpo.launch import help
from sdpo.run import folder as run_folder

FILES = ["data.train=[a.jsonl,b.jsonl]", "data.template=plain", "data.held_out_share=0.2"]
TOY = ["model=local", "model.path=model", "data=local", *FILES, "optim.pairs_per_update=8"]
HERE = ["model.name=local", "model.path=model", "data.name=local", *FILES]  # instead of what an option names
PAPER = [*HERE, "data.held_out=[]", "precision=fp32", "launch.ranks=1", "deepspeed=off", "evaluate=[preference]"]
WORLD = ["model.lab.width=16", "model.lab.layers=1", "model.sft.epochs=1", "data.lab.num_demonstrations=512"]
WORLD += [f"data.lab.num_{name}=8" for name in ("held_out", "prompts", "items")]


def small(*sources):
    """The settings of a small laboratory with these sources."""
    return [*WORLD, *(f"data.lab.sources.{source}.num_pairs=32" for source in sources)]


SMALL = small("teacher", "on_policy", "edits")
BESIDE = {  # settings that the options of a group are trained with, if not TOY
    "model": ["data=local", *HERE],
    "data": ["model=local", *HERE],
    "score": [*TOY, "split=easy_to_hard", "split.level=pair", "split.num_chunks=2"],
    "arm": SMALL,
    "experiment": PAPER,
}
NEEDS = {  # more settings, which an option requires
    "split=repeat": ["split.num=2"],
    "split=replay": ["split.path=split.json"],
    "reference=periodic": ["reference.updates=2"],
    "reference=mixed": ["reference.updates=2"],
    "reference=until_kl": ["reference.bound=1e-9"],
    "reference=external": ["reference.path=other", "reference.template=plain"],
    "reference=none": ["loss=simpo"],
    "loss=mixture": ["loss.of=[{name: dpo, weight: 1.0, beta: 0.1}, {name: sft, weight: 0.2}]"],
    "score=implicit_reward": ["score.path=other"],
    "rounds=on_policy": ["rounds.path=classifier", "rounds.template=plain", "rounds.max_new_tokens=8"],
    "score=reward_model": ["score.path=classifier", "score.template=plain"],
    "evaluate=[generate]": ["evaluate.generate.file=prompts.txt", "evaluate.generate.max_new_tokens=8"],
    "evaluate=[win_rate]": [
        *("evaluate.win_rate.file=prompts.txt", "evaluate.win_rate.max_new_tokens=8"),
        *("evaluate.win_rate.path=classifier", "evaluate.win_rate.template=plain"),
    ],
    "evaluate=[reward_bench]": ["evaluate.reward_bench.pairs=[b.jsonl]"],
    "evaluate=[h4]": ["evaluate.h4.local=eval", "evaluate.h4.limit=1"],
    "evaluate=[lm_eval]": ["evaluate.lm_eval.local=eval", "evaluate.lm_eval.tasks=[hellaswag]"],
    **dict.fromkeys(("data=ultrafeedback", "data=real", "data=real_folder"), ["data.held_out=[]"]),
    "experiment=published/refdpo_other": ["reference.path=other", "reference.template=plain"],
    "experiment=paper/table4": ["~evaluate.lm_eval"],
    "experiment=paper/table1": ["hydra.sweeper.params.arm=baseline/all_at_once"],  # the other arms are trained by `arm`
}
STUDY = [*HERE, "data.train=[a.jsonl,b.jsonl,c.jsonl]", "data.held_out=[]", "precision=fp32"]
STUDY += ["evaluate.generate.max_new_tokens=4"]
OTHERS = ["reference.path=other", "reference.template=plain"]
INSTEAD = {  # settings that replace those of the option's group
    "model=lab": ["data=lab", *SMALL],
    "data=lab": ["model=lab", *SMALL],
    "rounds=on_policy_lab": ["model=lab", "data=lab", *SMALL],
    "arm=published/intel_dpo": [*TOY, *OTHERS],
    "arm=published/solar_70b": [*TOY, *OTHERS],
    "arm=published/mistral_instruct": [*TOY, *OTHERS],
    "arm=published/llama_70b_instruct": [*TOY, *OTHERS],
    "experiment=smoke": [],
    "experiment=published/pre_dpo": SMALL,
    "experiment=study/base": SMALL,
    "experiment=real/stories": [*HERE, "hydra.sweeper.params.seed=0"],
    **{f"experiment=real/{name}": [*STUDY, "hydra.sweeper.params.seed=0"] for name in ("core", "full")},
}
# What needs an endpoint, or the files of other programs, runs in tests of its own. Four sweeps are others again, with
# several betas or lr. The arms of a sweep that is trained here are trained by it.
ELSEWHERE = ["evaluate=[judge]", "evaluate=[results]", "rounds=on_policy_judge"]
ELSEWHERE += [f"experiment=study/{name}" for name in ("frontier", "frontier_dev", "frontier_moving", "references_beta")]
for name in help.options("experiment"):
    if name in ("demo", "controls") or name.startswith("study/"):
        written = OmegaConf.load(CONF / "experiment" / f"{name}.yaml")
        sources = OmegaConf.select(written, "data.lab.sources", default={})
        used = [source for source, settings in sources.items() if settings.get("num_pairs")]
        INSTEAD.setdefault(f"experiment={name}", [*(small(*used) if used else SMALL), "hydra.sweeper.params.seed=0"])
        swept = OmegaConf.select(written, "hydra.sweeper.params.arm", default="")
        ELSEWHERE += [f"arm={arm}" for arm in swept.split(",") if f"experiment={name}" not in ELSEWHERE]


@pytest.fixture(scope="module")
def place(toy, tmp_path_factory):
    """A folder to run in: the toy's model and pairs, rated; another model, a classifier and a split; and the store."""
    folder = tmp_path_factory.mktemp("place")
    for source in "abc":
        pairs = map(json.loads, (toy / f"{source}.jsonl").read_text().splitlines()[:15])
        rated = [
            pair | {"chosen_rating": 3.0, "rejected_rating": 1.0 + n % 2, "pair_score": n}
            for n, pair in enumerate(pairs)
        ]
        (folder / f"{source}.jsonl").write_text("\n".join(map(json.dumps, rated)))
    shutil.copytree(toy / "model", folder / "model")
    (folder / "eval").symlink_to(REAL_DATA / "eval")
    (folder / "prompts.txt").write_text("abc\nfed cab\n")
    torch.manual_seed(0)
    for name, model in {
        "other": random_model(seed=1),
        "classifier": LlamaForSequenceClassification(LlamaConfig(**TINY, num_labels=1)),
    }.items():
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDPO_STORE", str(folder / "store"))
        patch.chdir(folder)
        train("by_source", "previous", folder / "first")
        shutil.copy(folder / "first" / "split.json", folder)
        yield folder


@functools.cache
def chosen(option):
    """The configuration of one choice on the toy; kept, because composing takes longer than training."""
    return compose(*TOY, "evaluate=[]", option, *NEEDS.get(option, []))


def train(split, reference, folder):
    given = chosen(f"reference={reference}")
    settings = replace(chosen(f"split={split}"), reference=given.reference, loss=given.loss)
    validate.check(settings)
    run_folder.Run(settings, folder, choices={}, arm="").prepare()
    return stepwise.run(settings, folder)


@pytest.mark.parametrize("reference", help.options("reference"))
@pytest.mark.parametrize("split", help.options("split"))
def test_every_split_trains_with_every_reference(place, tmp_path, split, reference):
    summary = train(split, reference, tmp_path)
    manifest, receipt = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("manifest", "split"))
    assert len(summary["steps"]) == len(receipt["chunks"])
    first = {entry["t"]: entry["margin"] for entry in read_lines(tmp_path, "train") if entry["update"] == 1}
    for step in manifest["steps"]:
        t, windows = step["t"], step["windows"]
        if reference == "none":
            assert windows == [] and first[t] is None
            continue
        # By hand, test_reference.py says which model a rule begins with; here that model is the one that is scored.
        assert (list(windows[0]["weights"]) == [step["start"]]) is (first[t] == 0.0)


def commands():
    """The commands that train all options: of each group one sweep of what requires nothing, and the others alone."""
    for group in help.groups():
        options = [f"[{option}]" if group == "evaluate" else option for option in help.options(group)]
        options = [option for option in options if f"{group}={option}" not in ELSEWHERE]
        choices = [f"{group}={option}" for option in options]
        alone = [choice for choice in choices if choice in NEEDS | INSTEAD or group == "experiment"]  # itself a sweep
        free = [option for option, choice in zip(options, choices, strict=True) if choice not in alone]
        beside = BESIDE.get(group, TOY)
        if free:
            yield pytest.param([*beside, f"{group}={','.join(free)}"], id=group)
        for choice in alone:
            settings = INSTEAD.get(choice, [*beside, *NEEDS.get(choice, [])])
            yield pytest.param([*settings, choice], id=choice)


def train_py(folder, arguments):
    """What `python train.py ARGUMENTS` does in a folder."""
    os.chdir(folder)
    sys.argv[:] = ["train.py", *arguments]
    entry_point.command()


@pytest.mark.slow
@pytest.mark.parametrize("overrides", list(commands()))
def test_every_option_of_every_group_trains_through_train_py(place, tmp_path, request, overrides):
    if "evaluate" in request.node.callspec.id:
        request.getfixturevalue("real_data")
    started = functools.partial(train_py, place, ["-m", *overrides, f"hydra.sweep.dir={tmp_path}"])
    store, output = {"SDPO_STORE": os.environ["SDPO_STORE"]}, tmp_path / "output.txt"
    process = forked.start(started, store, output)
    process.join()
    assert process.exitcode == 0, output.read_text()
    assert len(list(tmp_path.glob("*/done"))) == len(json.loads((tmp_path / "sweep.json").read_text())["runs"])
