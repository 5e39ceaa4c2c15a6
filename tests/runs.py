"""Run and sweep folders for the tests of analysis/: copies of two real tiny runs, in which only numbers are changed.

The real ones are made once, on the smallest laboratory: plain DPO in one step and stepwise DPO in two, both asked two
prompts. What `make_run` writes has their files, keys, columns and kinds of lines (see test_runs_fixture.py).
"""

import atexit
import functools
import hashlib
import json
import shutil
import tempfile
from math import log, log2
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import CONF
from hydra import compose, initialize_config_dir

SOURCES = ("teacher", "on_policy")
NUM_PAIRS = 48  # of each source in training; a quarter as many are held out
UPDATES = 12  # of each step

BASE = ["experiment=smoke", "~data.lab.sources.edits", f"data.lab.num_held_out={NUM_PAIRS // 4}"]
BASE += [f"data.lab.sources.{source}.num_pairs={NUM_PAIRS}" for source in SOURCES]
BASE += ["evaluate=[preference,lab,generate]", "evaluate.generate.max_new_tokens=4", f"probe.every={UPDATES // 2}"]
ARMS = {  # by the number of steps
    1: ["split=all_at_once", "reference=initial", f"optim.pairs_per_update={2 * NUM_PAIRS // UPDATES}"],
    2: ["split=by_source", "reference=previous", f"optim.pairs_per_update={NUM_PAIRS // UPDATES}"],
}
PROMPTS = {"first": ["Rabcdef", "Nabcdef"], "second": ["Tabcdef"]}  # in the laboratory's letters
ASKED = {"first": ["What is a < b?", "And b?"], "second": ["Say nothing."]}  # the prompts in the copies


@functools.cache
def real_sweep() -> Path:
    """The folder of a real sweep of two real runs, `1` of one step and `2` of two; it lives as long as this process."""
    from sdpo import stepwise
    from sdpo.launch import sweep
    from sdpo.run import folder as run_folder
    from sdpo.run.folder import Run

    place = Path(tempfile.mkdtemp(prefix="sdpo-real-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    asked = place / "prompts.jsonl"
    asked.write_text("".join(json.dumps({"id": id, "turns": turns}) + "\n" for id, turns in PROMPTS.items()))
    folder, overrides = place / "tiny", [*BASE, f"evaluate.generate.file={asked}"]
    made = []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for num_steps, its_own in ARMS.items():
            composed = compose("config", overrides=[*overrides, *its_own], return_hydra_config=True)
            job, name = run_folder.without_hydra(composed), str(num_steps)
            made.append(Run.from_composed(job, composed.hydra, folder / name, arm=name, sweep=folder.name))
    contrasts = {"order": ["2", "1"]}
    sweep._prepare(sweep.Sweep(folder, made, overrides, contrasts, n=1, backend="local", slurm={}), made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDPO_STORE", str(place / "store"))
        for run in made:
            stepwise.run(run.config, run.folder)
            run_folder.finish(run.folder, run_folder.stamp(run.config))
    return folder


def make_run(
    folder: Path, *, arm="stepwise", seed=0, num_steps=2, gold=0.85, leverage=0.1, sweep=None, answers=True
) -> Path:
    """Write one finished run: S and `num_steps` steps (1 or 2) whose last gold reward is exactly `gold`.

    Without `answers` the run has no prompts and no answers.
    """
    shutil.copytree(real_sweep() / str(num_steps), folder, symlinks=True)
    rng = np.random.default_rng(seed)
    manifest = _manifest(folder, arm, seed) | {"run": folder.name, "sweep": sweep, "arm": arm, "seed": seed}
    manifest["command"] = ["train.py", "experiment=synthetic", f"seed={seed}"]
    reused = {step["t"]: step["reused"] for step in manifest["steps"]}
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    metrics = [line for line in lines if answers or line["kind"] != "answers"]
    for line in metrics:
        t = line["t"]
        match line["kind"]:
            case "train":
                line |= _update(line["update"])
            case "step":
                line |= _step(t, reused[t], leverage)
            case "eval":
                line["eval"] = _evaluation(line["eval"], t / num_steps, gold, answers, rng)
            case "answers":
                line["answers"] = [_answer(row, t, arm) for row in line["answers"]]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    summary = _summary(json.loads((folder / "summary.json").read_text()), metrics, seed)
    for name, content in (("manifest", manifest), ("summary", summary)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    _write_answers(folder, metrics)
    _write_tables(folder, rng)
    _finish(folder, seed, answers)
    return folder


def make_sweep(
    folder: Path, *, seeds=3, arms=("all at once", "stepwise"), gains=(0.0, 0.02), leverage=0.1, answers=True
) -> Path:
    """A sweep of arms whose gold at each seed differs from the first arm's by exactly the arm's gain."""
    names = []
    for arm, gain in zip(arms, gains, strict=True):
        for seed in range(seeds):
            names.append(f"{arm.replace(' ', '_')}-s{seed}")
            make_run(
                folder / names[-1],
                arm=arm,
                seed=seed,
                num_steps=1 if arm == "all at once" else 2,
                gold=0.8 + 0.01 * seed + gain,
                leverage=leverage,
                sweep=folder.name,
                answers=answers,
            )
    sweep = json.loads((real_sweep() / "sweep.json").read_text()) | {
        "name": folder.name,
        "command": ["train.py", "experiment=synthetic"],
        "overrides": ["experiment=synthetic"],
        "runs": names,
        "contrasts": {name: [arm, arms[0]] for name, arm in zip(("order", "strength"), arms[1:], strict=False)},
    }
    (folder / "sweep.json").write_text(json.dumps(sweep))
    return folder


def _manifest(folder, arm, seed):
    """The manifest with its own model keys; stepwise arms with the same seed share the first step."""
    text = (folder / "manifest.json").read_text()
    steps = json.loads(text)["steps"]
    for step in steps:
        t, made_by = step["t"], "any" if step["t"] == 1 else arm
        text = text.replace(step["key"], hashlib.sha256(f"{seed} {len(steps)} {t} {made_by}".encode()).hexdigest())
    manifest = json.loads(text)
    for step in manifest["steps"]:
        step["reused"] = step["t"] == 1 and seed > 0
        step["gamma_ref_mean"] = step["windows"][0]["gamma_ref_mean"] = -2.0 + step["t"]
    return manifest


def _update(update):
    progress = (update - 1) / UPDATES
    return {
        "loss": log(2) * (1 - 0.7 * progress),
        "margin": 3 * progress,
        "lambda_mean": 0.5 - 0.3 * progress,
        "lambda_std": 0.1 * progress,
        "reward_accuracy": 0.5 + 0.4 * progress,
        "seconds": 0.1,
    }


def _step(t, reused, leverage):
    return {
        "first_loss": log(2),
        "last_loss": 0.3,
        "gamma_ref_mean": -2.0 + t,
        "reference_leverage": leverage if t > 1 else 0.0,
        "reused": reused,
        "seconds": 2.0,
    }


def _evaluation(measures, share, gold, answers, rng):
    """The measures of a model after this share of the steps; the last model has the gold reward `gold`."""
    changed = {}
    for name, numbers in measures.items():
        value = _value(name, share, gold, rng)
        if numbers["value"] is not None and value is not None:
            numbers = numbers | {"value": value, "low": value - 0.02, "high": value + 0.02}
        if answers or not name.startswith("generate/"):
            changed[name] = numbers
    return changed


def _value(name, share, gold, rng):
    """The value of a measure; None if it keeps its value."""
    suite, *between, last = name.split("/")
    if between == ["best_of"]:
        return 0.69 + 0.05 * log2(int(last))
    if suite == "lab":
        values = {"gold": gold if share == 1 else 0.69 + share * (gold - 0.69), "kl": 1.5 * share}
        return None if between else values.get(last)
    source = 1 + SOURCES.index(between[0]) if between else 0
    values = {
        "ranking_accuracy": 0.6 - 0.05 * source + 0.2 * share,
        "reward_accuracy_initial": 0.5 + 0.3 * share,
        "shorter_accuracy": 0.55,
        "gamma": 1 + 3 * share + rng.normal(0, 0.1),
        "log_ratio_chosen": -1.0 * share,
        "log_ratio_rejected": -4.0 * share,
    }
    return values.get(last) if suite == "preference" else None


def _answer(row, t, arm):
    """The answers of one model to a prompt; the first prompt has two turns."""
    said = {"first": [f"M_{t} of {arm} says {'a long sentence, ' * 9}and stops.", "No."], "second": [""]}
    return row | {"turns": ASKED[row["id"]], "answers": said[row["id"]]}


def _summary(summary, metrics, seed):
    """The summary that goes with these metrics."""
    evals = {line["t"]: line["eval"] for line in metrics if line["kind"] == "eval"}
    steps = [line for line in metrics if line["kind"] == "step"]
    for old, new in zip(summary["steps"], steps, strict=True):
        old |= {name: new[name] for name in old if name != "eval"} | {"eval": evals[new["t"]]}
    summary["initial"]["eval"] = evals[0]
    last, reused = evals[max(evals)]["lab/gold"], sum(step["reused"] for step in steps)
    summary["headline"] |= {"name": "lab/gold", "value": last["value"], "n": last["n"]}
    return summary | {"seconds": 5.0 + seed, "trained_steps": len(steps) - reused, "reused_steps": reused}


def _write_answers(folder, metrics):
    """Write the answers in the metrics in the formats of benchmarks, too; remove the folder if there are none."""
    from sdpo.evals.answer_formats import write_formats

    for path in (folder / "answers").glob("*-M_*"):
        path.unlink()
    said = [line for line in metrics if line["kind"] == "answers"]
    for line in said:
        write_formats(folder / "answers", f"{folder.name}-M_{line['t']}", line["answers"])
    if not said:
        shutil.rmtree(folder / "answers")


def _write_tables(folder, rng):
    """Write scores that a split could have ordered the pairs by, and log-probabilities that change with training."""
    pairs, followed = (pd.read_parquet(folder / f"{name}.parquet") for name in ("pairs", "trajectory"))
    scores = rng.normal(1 - pairs["source"].map(SOURCES.index))
    pairs["score"] = np.where(pairs["held_out"], np.nan, scores)
    pairs.to_parquet(folder / "pairs.parquet", index=False)
    ability = dict(zip(pairs["id"], rng.normal(0, 4, len(pairs)).round(1), strict=True))
    base, inside = followed["id"].map(ability), followed["update"] > 0
    trained = followed["t"] - 1.0 * (followed["role"] == "reference") - 0.5 * inside
    gain = 1.5 * trained + 4.0 * followed["seen"]
    followed["chosen_logp"] = (-20 + base / 2 - 0.5 * trained).astype(np.float32)
    followed["rejected_logp"] = (-20 - base / 2 - 0.5 * trained - gain).astype(np.float32)
    followed.to_parquet(folder / "trajectory.parquet", index=False)


def _finish(folder, seed, answers):
    """Write the configuration of the run, and mark the run as finished."""
    from sdpo import config
    from sdpo.run import folder as run_folder

    settings = config.load(folder / "config.yaml")
    settings.seed = seed
    if not answers:
        del settings.evaluate["generate"]
    (folder / "config.yaml").write_text(config.to_yaml(settings))
    run_folder.finish(folder, run_folder.stamp(settings))
