"""Benchmarks by lm-eval's own task definitions, on the weights in memory.

`h4` has the shots, metrics and means of the first Open LLM Leaderboard, which the sDPO paper (2403.19270) reports.
Import this file only to run a benchmark: lm-eval takes seconds to import.
"""

import copy
import io
import json
import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from functools import cache
from importlib.metadata import version
from math import isclose, nan
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import lm_eval.tasks
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdpo import distributed, stats
from sdpo.errors import UserError, one_line
from sdpo.stats import Interval, Measure, Measures

Overrides = dict[str, Any]  # settings that replace those of a task's definition

H4 = {  # task -> shots, metric
    "arc_challenge": (25, "acc_norm"),
    "hellaswag": (10, "acc_norm"),
    "mmlu": (5, "acc"),
    "truthfulqa_mc2": (0, "acc"),
}
H4_FOLDERS = ("arc", "hellaswag", "mmlu/default", "truthfulqa")
ALL_FOLDERS = (".",)  # thousands of definitions, which take ten seconds to read

SEED = 1234  # with which lm-eval's command line samples

logging.getLogger("lm_eval").setLevel(logging.ERROR)


class Asking(NamedTuple):
    """How a model is asked. Names and defaults are those of lm-eval; None and {} are what a task says itself."""

    num_fewshot: int | None = None
    apply_chat_template: bool = False  # the tokenizer's own
    fewshot_as_multiturn: bool = True  # shots as turns of a conversation, if there is a chat template
    system_instruction: str | None = None
    gen_kwargs: dict[str, Any] | None = None  # how answers are generated


def h4(lm: "DistributedHFLM", local: str | None, limit: int | None) -> Measures:
    """ARC-Challenge (25 shots), HellaSwag (10), MMLU (5), TruthfulQA MC2 (0), and their mean `h4`.

    `local` is a folder with copies of the tasks' data. `limit` is the largest number of items per task, and for MMLU
    per subject. Raises UserError if a local copy is missing.
    """
    tasks = {name: {"num_fewshot": shots} for name, (shots, _) in H4.items()}
    results = run(lm, tasks, _definitions(H4_FOLDERS), local, limit, Asking())
    return distributed.broadcast(results and _of_leaderboard(results))


def _of_leaderboard(results: dict) -> Measures:
    """The measures of `h4`. MMLU is the mean over its subjects, whatever their sizes; lm-eval's own is over items."""
    scores = _measures(results, Asking())
    measures = {f"h4/{name}": scores[name][metric] for name, (_, metric) in H4.items()}
    if subjects := [scores[name]["acc"] for name in results["n-samples"] if name.startswith("mmlu_")]:
        version = measures["h4/mmlu"]["version"] + ", mean over subjects"
        measures["h4/mmlu"] = _mean(subjects) | {"version": version}
    return {"h4": _mean(list(measures.values()))} | measures


def benchmark(
    lm: "DistributedHFLM", local: str | None, limit: int | None, tasks: list[str], asking: dict[str, Any]
) -> Measures:
    """All metrics of the given lm-eval tasks and groups, and of every task in a group, as `task/metric`.

    `asking` are the fields of Asking. The other options are those of `h4`. Raises UserError if lm-eval does not know a
    name.
    """
    known, asked = _definitions(ALL_FOLDERS), Asking(**asking)
    if unknown := set(tasks) - set(known.all_tasks):
        raise UserError(f"lm-eval has no task {', '.join(sorted(unknown))}; `lm_eval ls tasks` lists what it has")
    overrides = {} if asked.num_fewshot is None else {"num_fewshot": asked.num_fewshot}
    results = run(lm, dict.fromkeys(tasks, overrides), known, local, limit, asked)
    scores = distributed.broadcast(results and _measures(results, asked))
    return {f"{task}/{metric}": measure for task, found in scores.items() for metric, measure in found.items()}


class Definitions(lm_eval.tasks.TaskManager):
    """lm-eval's tasks and groups. A task is loaded by its name together with its overrides."""

    def _load_spec(self, spec: tuple[str, Overrides]):
        name, overrides = spec
        return self._factory.build(self.task_index[name], overrides=overrides, registry=self.task_index)


class LocalTask(ConfigurableTask):
    """A task of lm-eval whose rows come from local files; nothing else is changed."""

    def __init__(self, config: Overrides):
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs: Overrides, **_) -> None:
        self.dataset = _local_splits(Path(dataset_kwargs["folder"]), self.config.task, self.DATASET_NAME)


class DistributedHFLM(HFLM):
    """lm-eval's Hugging Face model. Every rank has the whole model; the requests are divided over the ranks by item.

    lm-eval itself would divide the items before it draws their shots, so that the shots would depend on the number of
    ranks.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int):
        super().__init__(model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)  # HFLM sets its pad token

    def loglikelihood(self, requests: list[Instance], **options) -> list:
        return _answer_divided(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Instance], **options) -> list:
        return _answer_divided(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Instance], **options) -> list:
        return _answer_divided(super().generate_until, requests)


def _answer_divided(answer: Callable[[list[Instance]], list], requests: list[Instance]) -> list:
    """The answers to all requests, in order and on every rank; each rank answers the requests of its own items."""
    rank, num_ranks = distributed.rank(), distributed.world_size()
    own = [i for i, request in enumerate(requests) if request.doc_id % num_ranks == rank]
    return distributed.gather_numbered(dict(zip(own, answer([requests[i] for i in own]), strict=True)))


@cache
def _definitions(folders: tuple[str, ...]) -> Definitions:
    root = Path(lm_eval.tasks.__file__).parent
    return Definitions(include_path=[root / folder for folder in folders], include_defaults=False)


def run(
    lm: DistributedHFLM,
    tasks: dict[str, Overrides],
    definitions: Definitions,
    local: str | None,
    limit: int | None,
    asking: Asking,
    log_samples: bool = False,
) -> dict | None:
    """lm-eval's own results; None on all ranks but the first.

    Raises UserError if the Hub cannot be reached or a package is missing.
    """
    data: Overrides = {"class": LocalTask, "dataset_kwargs": {"folder": local}} if local else {}
    options = asking._replace(num_fewshot=None)._asdict()  # it stands among the overrides of a task
    options |= {"task_manager": definitions, "limit": limit, "log_samples": log_samples}
    # Otherwise lm-eval would seed the whole process; shots have a seed of their own.
    options |= dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"))
    bars = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())  # they are for a terminal
    try:
        with bars, torch.random.fork_rng():
            torch.manual_seed(SEED)
            return lm_eval.simple_evaluate(lm, tasks=[(name, given | data) for name, given in tasks.items()], **options)
    except ConnectionError as error:
        reason = f"the data of {', '.join(tasks)} cannot be loaded ({one_line(error)})"
        raise UserError(f"{reason}; `local` names a folder with copies of it") from error
    except ModuleNotFoundError as error:
        reason = f"{', '.join(tasks)} needs the package {error.name}"
        raise UserError(
            f"{reason}; the extras of lm-eval have it, as in `pip install 'lm-eval[ifeval,math]'`"
        ) from error


def _measures(results: dict, asking: Asking) -> dict[str, Measures]:
    """Every metric of every task and group: lm-eval's value, with the Student interval from its standard error.

    A metric counts as a share, with Wilson's interval, if its standard error is sqrt(p (1 - p) / (n - 1)), which only a
    mean of zeros and ones has.
    """
    scores: dict[str, Measures] = {}
    for name, found in results["results"].items():
        label, n = _label(name, results, asking), found["sample_len"]
        scores[name] = {}
        for key, value in found.items():
            metric, _, filtering = key.partition(",")
            if not filtering or metric.endswith("_stderr"):
                continue
            stderr = found.get(f"{metric}_stderr,{filtering}")
            error, value = nan if stderr == "N/A" else float(stderr), float(value)
            is_share = 0 <= value <= 1 and isclose(error**2 * (n - 1), value * (1 - value), rel_tol=1e-6, abs_tol=1e-12)
            interval = stats.of_share(value, n) if is_share else stats.around(value, error, n)
            measure = stats.as_measure(interval) | {"version": label}
            scores[name][metric if filtering == "none" else f"{metric}/{filtering}"] = measure
    return scores


def _label(name: str, results: dict, asking: Asking) -> str:
    """What decides a task's score beside the model: versions, shots, and how the model is asked."""
    parts = [f"{name} {results['versions'].get(name)}", f"lm-eval {version('lm_eval')}"]
    if (shots := results["n-shot"].get(name)) is not None:
        parts.append(f"{shots} shots")
    if asking.apply_chat_template:
        parts.append("chat template, shots as turns" if asking.fewshot_as_multiturn else "chat template")
    if asking.system_instruction:
        parts.append(f"system prompt {asking.system_instruction!r}")
    return ", ".join(parts + [f"{key}={value}" for key, value in (asking.gen_kwargs or {}).items()])


def _mean(measures: list[Measure]) -> Measure:
    """The mean of independent measures; the sides of its interval are the root mean squares of theirs, over sqrt(n)."""
    value = sum(m["value"] for m in measures) / len(measures)
    low, high = (
        sum(nan if m[side] is None else (m[side] - m["value"]) ** 2 for m in measures) ** 0.5 / len(measures)
        for side in ("low", "high")
    )
    interval = Interval(value, value - low, value + high, sum(m["n"] for m in measures))
    return stats.as_measure(interval) | {"version": "; ".join(m["version"] for m in measures)}


def _local_splits(folder: Path, task: str, part: str | None) -> datasets.DatasetDict:
    """A task's splits from the files `<name>.<split>.jsonl`; `name` is the longest that the task's name begins with.

    Rows are as in the original data set. If they have a `subject` (MMLU), only the rows of the task's part are taken.
    """
    names = {path.name.split(".")[0] for path in folder.glob("*.*.jsonl")}
    fitting = [name for name in names if task.startswith(name)]
    if not fitting:
        raise UserError(f"{folder} has no local copy of {task}: {task}.<split>.jsonl, rows as in the original data set")
    splits = {}
    for path in folder.glob(f"{max(fitting, key=len)}.*.jsonl"):
        rows = [row for row in _read(path) if row.get("subject", part) == part]
        if not rows:
            raise UserError(f"{path} has no row with subject {part}")
        splits[path.name.split(".")[1]] = datasets.Dataset.from_list(rows)
    return datasets.DatasetDict(splits)


@cache
def _read(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
