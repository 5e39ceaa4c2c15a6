"""What is measured on S and after every step: one function per suite, each a dictionary of named measures.

The positional parameters say what a suite reads. Log-probs are [N, 2] in nats: the chosen and the rejected response
of N held-out pairs. `report` takes what a suite has besides numbers. Measures are those of sdpo.measures.
"""

from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np

from sdpo.data import prompts
from sdpo.data.preferences import Pair
from sdpo.evals import generation, reward_model
from sdpo.evals.generation import LIBRARIES, Decoding
from sdpo.lab import exam as lab_exam
from sdpo.lab import measures as lab_measures
from sdpo.model import hub
from sdpo.stats import Measures, length_controlled, mean, share_above
from sdpo.store import Artifact, hash_files
from sdpo.train.runner import Runner


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
        "ranking_accuracy": share_above(gamma),
        "gamma": gamma,
        "chosen_logp": policy[:, 0],
        "rejected_logp": policy[:, 1],
        "log_ratio_chosen": None if ratio is None else ratio[:, 0],
        "log_ratio_rejected": None if ratio is None else ratio[:, 1],
        "shorter_accuracy": share_above(lengths[:, 1] - lengths[:, 0]),
    }
    for name, other in (("step", reference), ("initial", initial)):
        margin = None if other is None else gamma - (other[:, 0] - other[:, 1])
        columns[f"reward_accuracy_{name}"] = None if margin is None else share_above(margin)
        columns[f"margin_{name}"] = margin
    measures = {f"preference/{name}": mean(values) for name, values in columns.items()}
    names = np.array(sources)
    for source in dict.fromkeys(sources):
        for name in ("ranking_accuracy", "reward_accuracy_initial", "gamma", "shorter_accuracy"):
            values = columns[name]
            measures[f"preference/{source}/{name}"] = mean(None if values is None else values[names == source])
    return measures


def lab(model: Artifact, initial_model: Artifact, exam: lab_exam.Exam | None, runner: Runner) -> Measures:
    """The laboratory's exact gold reward, KL to S and multiple-choice accuracy, with the same noise for every model,
    and of S the gold reward of its best of n; nothing on other data. Kept in the store by model, S and exam."""
    if exam is None:
        return {}
    given, host = {"exam": asdict(exam), **LIBRARIES}, runner.load_verified
    measures = runner.store.make_json(
        "evaluation",
        {"suite": "lab", "weights": model.key, "initial": initial_model.key} | given,
        lambda: lab_measures.measure(host(model), host(initial_model), runner.tokenizer, exam, seed=0),
    )
    if model.key == initial_model.key:
        measures |= runner.store.make_json(
            "evaluation",
            {"suite": "best_of_n", "weights": model.key} | given,
            lambda: lab_measures.best_of_n(host(model), runner.tokenizer, exam, seed=0),
        )
    return measures


def generate(
    model: Artifact,
    initial_model: Artifact,
    runner: Runner,
    report: Callable[[dict], None],
    *,
    file: str,
    temperature: float = 0.0,
    max_new_tokens: int = 512,
    batch_size: int = 16,
    seed: int = 0,
) -> Measures:
    """Answers to the prompts of a file, which are told, their lengths, and KL(M_t, S) on answers at temperature 1.

    `generate/ended` is the share of answers that stop before `max_new_tokens`; the KL of longer ones is cut there.
    """
    asked, decoding = prompts.read(file), Decoding(temperature, max_new_tokens, batch_size, seed)
    given = generation.give(model, asked, decoding, runner)
    report({"decoding": decoding._asdict(), "answers": generation.told(asked, given)})
    flat = [answer for turns in given for answer in turns]
    return {
        "generate/kl": mean(np.array(generation.divergence(model, initial_model, asked, decoding, runner))),
        "generate/tokens": mean(np.array([len(answer["ids"]) for answer in flat])),
        "generate/ended": mean(np.array([answer["ended"] for answer in flat])),
    }


def win_rate(
    model: Artifact,
    initial_model: Artifact,
    runner: Runner,
    *,
    file: str,
    path: str,
    revision: str | None = None,
    template: str | None = None,
    temperature: float = 0.0,
    max_new_tokens: int = 512,
    batch_size: int = 16,
    seed: int = 0,
) -> Measures:
    """How often the sequence classifier at `path` prefers the model's answer to that of S, as it is and at equal length
    in characters (`sdpo.measures.length_controlled`); first turns alone. S itself has none."""
    names = ("", "/length_controlled", "/reward_gap", "/longer")
    if model.key == initial_model.key:
        return {f"win_rate{name}": mean(None) for name in names}
    asked, decoding = prompts.read(file), Decoding(temperature, max_new_tokens, batch_size, seed)
    texts = [
        [turns[0]["text"] for turns in generation.give(m, asked, decoding, runner)] for m in (model, initial_model)
    ]
    pairs = [
        Pair(str(prompt.id), prompt.dataset, ({"role": "user", "content": prompt.turns[0]},), *both)
        for prompt, *both in zip(asked, *texts, strict=True)
    ]
    rewards_N2 = reward_model.rewards({"path": path, "revision": revision, "template": template}, pairs, runner)
    gap = rewards_N2[:, 0] - rewards_N2[:, 1]
    wins, longer = share_above(gap), np.array([len(pair.chosen) - len(pair.rejected) for pair in pairs])
    values = (mean(wins), length_controlled(wins, longer), mean(gap), mean(longer))
    return {f"win_rate{name}": measure for name, measure in zip(names, values, strict=True)}


def h4(
    model: Artifact, runner: Runner, *, local: str | None = None, batch_size: int = 8, limit: int | None = None
) -> Measures:
    """ARC, HellaSwag, MMLU, TruthfulQA and their mean by lm-eval's own task definitions, with the leaderboard's shots.

    `local` is a folder with copies of the data; `limit` takes only so many items a task.
    """
    return _benchmark(model, runner, {"suite": "h4", "local": local, "batch_size": batch_size, "limit": limit})


def lm_eval(
    model: Artifact,
    runner: Runner,
    *,
    tasks: list[str],
    num_fewshot: int | None = None,
    local: str | None = None,
    batch_size: int = 8,
    limit: int | None = None,
) -> Measures:
    """Any tasks of lm-eval, by name."""
    settings = {"tasks": tasks, "num_fewshot": num_fewshot, "local": local, "batch_size": batch_size, "limit": limit}
    return _benchmark(model, runner, {"suite": "benchmark", **settings})


def _benchmark(model: Artifact, runner: Runner, settings: dict) -> Measures:
    """A suite of sdpo.benchmarks, kept in the store by model, settings, the local data's content and versions."""
    from sdpo.evals import eval_harness  # lm-eval takes seconds to import

    call = dict(settings)
    suite = getattr(eval_harness, call.pop("suite"))
    folder = Path(settings["local"]) if settings["local"] else None
    data = hash_files(folder, folder.iterdir()) if folder else None
    determinants = {
        "weights": model.key,
        "tokenizer": hub.fingerprint_tokenizer(runner.tokenizer),
        "lm_eval": version("lm_eval"),
        **settings,
        "local": data,  # by content, wherever it lies
    }

    def compute() -> Measures:
        runner.release()  # the engine, which would stand beside it on the device
        return suite(runner.load_verified(model).to(runner.device), runner.tokenizer, **call)

    return runner.store.make_json("evaluation", determinants, compute)
