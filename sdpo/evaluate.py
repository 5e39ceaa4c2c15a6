"""What is measured on S and after every step: one function per suite, each a dictionary of named measures.

The positional parameters say what a suite reads. Log-probs are [N, 2] in nats: the chosen and the rejected response
of N held-out pairs. A measure is {"value", "low", "high", "n"}: a mean with its 95 % interval, null where undefined.
"""

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers
from scipy import stats

from sdpo import lab as laboratory
from sdpo.store import Artifact, hash_files
from sdpo.workbench import Workbench, host_model

Measures = dict[str, dict]


def preference(
    policy: np.ndarray,
    reference: np.ndarray | None,
    initial: np.ndarray | None,
    lengths: np.ndarray,
    sources: list[str],
) -> Measures:
    """Held-out pairs: what the policy prefers, alone, against the step's reference and against S (one ruler).

    `reference` and `initial` are None where there is none: S has no reference and is not measured against itself.
    `preference/shorter_accuracy` is the baseline that takes the shorter response (tokens [N, 2]) for the better one.
    """
    gamma = policy[:, 0] - policy[:, 1]
    ratio = None if initial is None else policy - initial
    columns = {
        "ranking_accuracy": _share(gamma),
        "gamma": gamma,
        "chosen_logp": policy[:, 0],
        "rejected_logp": policy[:, 1],
        "log_ratio_chosen": None if ratio is None else ratio[:, 0],
        "log_ratio_rejected": None if ratio is None else ratio[:, 1],
        "shorter_accuracy": _share(lengths[:, 1] - lengths[:, 0]),
    }
    for name, other in (("step", reference), ("initial", initial)):
        margin = None if other is None else gamma - (other[:, 0] - other[:, 1])
        columns[f"reward_accuracy_{name}"] = None if margin is None else _share(margin)
        columns[f"margin_{name}"] = margin
    measures = {f"preference/{name}": _mean(values) for name, values in columns.items()}
    names = np.array(sources)
    for source in dict.fromkeys(sources):
        for name in ("ranking_accuracy", "reward_accuracy_initial", "gamma", "shorter_accuracy"):
            values = columns[name]
            measures[f"preference/{source}/{name}"] = _mean(None if values is None else values[names == source])
    return measures


def lab(model: Artifact, initial_model: Artifact, exam: laboratory.Exam | None, bench: Workbench) -> Measures:
    """The laboratory's exact gold reward, KL to S and multiple-choice accuracy, with the same noise for every model;
    nothing on other data. Kept in the store by model, S and exam."""
    if exam is None:
        return {}
    determinants = {"suite": "lab", "weights": model.key, "initial": initial_model.key, "exam": asdict(exam)}
    return bench.store.make_json(
        "evaluation",
        determinants | {"torch": torch.__version__, "transformers": transformers.__version__},
        lambda: laboratory.measure(host_model(model), host_model(initial_model), bench.tokenizer, exam, seed=0),
    )


def h4(
    model: Artifact, bench: Workbench, *, local: str | None = None, batch_size: int = 8, limit: int | None = None
) -> Measures:
    """ARC, HellaSwag, MMLU, TruthfulQA and their mean by lm-eval's own task definitions, with the leaderboard's shots.

    `local` is a folder with copies of the data; `limit` takes only so many items a task.
    """
    return _benchmark(model, bench, {"suite": "h4", "local": local, "batch_size": batch_size, "limit": limit})


def lm_eval(
    model: Artifact,
    bench: Workbench,
    *,
    tasks: list[str],
    num_fewshot: int | None = None,
    local: str | None = None,
    batch_size: int = 8,
    limit: int | None = None,
) -> Measures:
    """Any tasks of lm-eval, by name."""
    settings = {"tasks": tasks, "num_fewshot": num_fewshot, "local": local, "batch_size": batch_size, "limit": limit}
    return _benchmark(model, bench, {"suite": "benchmark", **settings})


def _benchmark(model: Artifact, bench: Workbench, settings: dict) -> Measures:
    """A suite of sdpo.benchmarks, kept in the store by model, settings, the local data's content and versions."""
    from sdpo import benchmarks  # lm-eval takes seconds to import

    call = dict(settings)
    suite = getattr(benchmarks, call.pop("suite"))
    folder = Path(settings["local"]) if settings["local"] else None
    data = {"data": hash_files(folder, folder.iterdir())} if folder else {}
    determinants = {"weights": model.key, "lm_eval": version("lm_eval"), **settings, **data}
    return bench.store.make_json(
        "evaluation", determinants, lambda: suite(host_model(model).to(bench.device), bench.tokenizer, **call)
    )


def _share(values: np.ndarray) -> np.ndarray:
    """1 where positive, 0 where negative, one half for a tie."""
    return (values > 0) + 0.5 * (values == 0)


def _mean(values: np.ndarray | None) -> dict:
    """The mean of one number per pair with its 95 % Student interval."""
    if values is None or len(values) == 0:
        return {"value": None, "low": None, "high": None, "n": 0}
    mean, n = float(np.mean(values, dtype=np.float64)), len(values)
    if n == 1:
        return {"value": mean, "low": None, "high": None, "n": 1}
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1, dtype=np.float64) / n**0.5)
    return {"value": mean, "low": mean - half, "high": mean + half, "n": n}
