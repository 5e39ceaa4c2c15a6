"""Synthetic run and sweep folders for the tests of analysis/: the layout of real ones, invented numbers."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

SOURCES = ("teacher", "on_policy")
NUM_PAIRS = 40  # of each source in training; a quarter as many are held out
UPDATES = 12  # of each step


def make_run(folder: Path, *, arm="stepwise", seed=0, num_steps=2, gold=0.85, leverage=0.1, sweep=None):
    """Write one ended run: S and `num_steps` steps whose last gold reward is exactly `gold`."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    pairs = _pairs(rng, num_steps)
    reference = "initial" if num_steps == 1 else "previous"
    manifest = {
        "run": folder.name,
        "sweep": sweep,
        "arm": arm,
        "choices": {"model": "lab", "split": "by_source", "reference": reference, "loss": "dpo"},
        "seed": seed,
        "model_key": "s" * 64,
        "steps": [_lineage(pairs, t, num_steps, arm, seed) for t in range(1, num_steps + 1)],
        "versions": {"torch": "2.13.0", "sdpo": "0.1.0"},
        "git": {"commit": "0" * 40, "dirty": False},
        "machine": {"cpu": "synthetic", "cores": 2},
        "command": ["train.py", "experiment=synthetic", f"seed={seed}"],
    }
    evals = [_evaluation(t, num_steps, gold, rng) for t in range(num_steps + 1)]
    steps = [_step(step, leverage if step["t"] > 1 else 0.0) for step in manifest["steps"]]
    metrics = [{"kind": "eval", "t": 0, "eval": evals[0]}]
    for step, evaluation in zip(steps, evals[1:], strict=True):
        metrics += [*_updates(step), step, {"kind": "eval", "t": step["t"], "eval": evaluation}]
    metrics += [_answers(t, arm) for t in range(num_steps + 1)]
    summary = {
        "steps": [{**step, "eval": evals[step["t"]]} for step in steps],
        "initial": {"eval": evals[0]},
        "headline": {"name": "lab/gold", "value": gold, "n": 256},
        "seconds": 5.0 + seed,
        "trained_steps": sum(not step["reused"] for step in steps),
        "reused_steps": sum(step["reused"] for step in steps),
    }
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in metrics))
    for name, content in (("manifest", manifest), ("summary", summary), ("data_report", _data_report(pairs))):
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "config.yaml").write_text("seed: 0\n")
    pairs.to_parquet(folder / "pairs.parquet", index=False)
    _trajectory(pairs, num_steps, rng).to_parquet(folder / "trajectory.parquet", index=False)
    (folder / "done").touch()
    return folder


def make_sweep(folder: Path, *, seeds=3, arms=("all at once", "stepwise"), gains=(0.0, 0.02), leverage=0.1):
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
            )
    sweep = {
        "name": folder.name,
        "command": ["train.py", "experiment=synthetic"],
        "overrides": ["experiment=synthetic"],
        "runs": names,
        "contrasts": {name: [arm, arms[0]] for name, arm in zip(("order", "strength"), arms[1:], strict=False)},
    }
    (folder / "sweep.json").write_text(json.dumps(sweep))
    return folder


def _pairs(rng, num_steps):
    rows = []
    for number, source in enumerate(SOURCES):
        for i in range(NUM_PAIRS + NUM_PAIRS // 4):
            held_out = i >= NUM_PAIRS
            chunk = 0 if held_out else 1 + number % num_steps
            score = float(rng.normal(1 - number))
            rows.append((f"{source}-{i}", source, held_out, chunk, score, 9, 8 + i % 3, 8 + i % 4, None, None))
    lengths = ["prompt_tokens", "chosen_tokens", "rejected_tokens"]
    ratings = ["chosen_rating", "rejected_rating"]
    columns = ["id", "source", "held_out", "chunk", "score", *lengths, *ratings]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(ratings, float))


def _lineage(pairs, t, num_steps, arm, seed):
    """One step's entry in the manifest; the first step of all stepwise arms of a seed is one artifact."""
    key = f"{seed}{num_steps}{t}" + ("common" if t == 1 else arm.encode().hex())
    start = "s" * 64 if t == 1 else f"{seed}{num_steps}{t - 1}common"
    sources = pairs[pairs["chunk"] == t]["source"].value_counts().to_dict()
    window = {"num_updates": UPDATES, "weights": {start: 1.0}, "gamma_ref_mean": -2.0 + t}
    return {
        "t": t,
        "key": key,
        "start": start,
        "windows": [window],
        "chunk_hash": f"{t}" * 64,
        "num_pairs": sum(sources.values()),
        "sources": sources,
        "reused": t == 1 and seed > 0,
    }


def _step(lineage, leverage):
    return {
        "kind": "step",
        "t": lineage["t"],
        "num_pairs": lineage["num_pairs"],
        "sources": lineage["sources"],
        "first_loss": float(np.log(2)),
        "last_loss": 0.3,
        "gamma_ref_mean": lineage["windows"][0]["gamma_ref_mean"],
        "gamma_ref_negative_share": 0.5,
        "lambda_mean": 0.3,
        "lambda_std": 0.1,
        "reference_leverage": leverage,
        "tokens_per_second": 1000.0,
        "utilisation": None,
        "reused": lineage["reused"],
        "seconds": 2.0,
    }


def _updates(step):
    for update in range(1, UPDATES + 1):
        progress = (update - 1) / UPDATES
        yield {
            "kind": "train",
            "t": step["t"],
            "update": update,
            "loss": float(np.log(2)) * (1 - 0.7 * progress),
            "margin": 3 * progress,
            "lambda_mean": 0.5 - 0.3 * progress,
            "lambda_std": 0.1 * progress,
            "reward_accuracy": 0.5 + 0.4 * progress,
            "chosen_logp": -9.0 + progress,
            "rejected_logp": -10.0 - 2 * progress,
            "grad_norm": 1.0,
            "lr": 5e-4,
            "pairs": 8,
            "tokens": 250,
            "seconds": 0.1,
        }


def _evaluation(t, num_steps, gold, rng):
    """The measures of one model, drifting with t; the last one has the gold reward asked for."""

    def measured(value, n=100):
        return {"value": value, "low": value - 0.02, "high": value + 0.02, "n": n}

    nothing = {"value": None, "low": None, "high": None, "n": 0}
    share = t / num_steps
    measures = {
        "lab/gold": measured(0.69 + share * (gold - 0.69) if t < num_steps else gold, 256),
        "lab/kl": measured(1.5 * share, 256),
        "lab/h4": measured(0.5 + 0.1 * share, 1000),
    }
    if t == 0:
        measures |= {f"lab/best_of/{n}": measured(0.69 + 0.05 * np.log2(n), 256) for n in (1, 2, 4)}
    for i, prefix in enumerate(["preference", *(f"preference/{source}" for source in SOURCES)]):
        measures |= {
            f"{prefix}/ranking_accuracy": measured(0.6 - 0.05 * i + 0.2 * share),
            f"{prefix}/reward_accuracy_initial": measured(0.5 + 0.3 * share) if t else nothing,
            f"{prefix}/shorter_accuracy": measured(0.55),
            f"{prefix}/gamma": measured(float(rng.normal(1 + 3 * share, 0.1))),
            f"{prefix}/log_ratio_chosen": measured(-1.0 * share),
            f"{prefix}/log_ratio_rejected": measured(-4.0 * share),
        }
    return measures


def _answers(t, arm):
    """What one model said to two prompts, of which the first has two turns."""
    asked = {"first": ["What is a < b?", "And b?"], "second": ["Say nothing."]}
    answers = {"first": [f"M_{t} of {arm} says {'a long sentence, ' * 9}and stops.", "No."], "second": [""]}
    rows = [{"id": id, "turns": turns, "dataset": "asked", "answers": answers[id]} for id, turns in asked.items()]
    return {"kind": "answers", "t": t, "decoding": {"temperature": 0.0}, "answers": rows}


def _trajectory(pairs, num_steps, rng):
    """Every model as policy on all pairs, as the next step's reference, and halfway through a step on its own pairs."""
    ability = dict(zip(pairs["id"], rng.normal(0, 4, len(pairs)), strict=True))
    tables = []
    for t in range(num_steps + 1):
        if t:
            middle = UPDATES // 2
            tables.append(_judged(pairs, ability, f"M_{t - 1}", t - 1, -1).assign(role="reference", t=t, update=0))
            tables.append(_judged(pairs[pairs["chunk"] == t], ability, f"t{t}/p{middle}", t, middle))
        tables.append(_judged(pairs, ability, f"M_{t}", t, -1))
    return pd.concat(tables, ignore_index=True)


def _judged(pairs, ability, model, t, update):
    """The log-probabilities of `pairs` under a model that has trained on the chunks up to its own step."""
    trained = t - 0.5 * (update >= 0)
    seen = (pairs["chunk"] > 0) & (pairs["chunk"] <= t)
    gain = 1.5 * trained + 4.0 * seen
    base = pairs["id"].map(ability)
    return pairs[["id", "source", "held_out", "chunk"]].assign(
        model=model,
        t=t,
        update=update,
        role="policy",
        chosen_logp=-20 + base / 2 - 0.5 * trained,
        rejected_logp=-20 - base / 2 - 0.5 * trained - gain,
        seen=seen,
    )


def _data_report(pairs):
    counts = pairs.groupby(["held_out", "source"]).size()
    return {
        "train": {source: int(counts[False, source]) for source in SOURCES},
        "held_out": {source: int(counts[True, source]) for source in SOURCES},
        "dropped": {"chosen equals rejected": 0},
        "duplicates": 0,
    }
