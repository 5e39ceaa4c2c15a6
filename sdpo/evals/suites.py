"""Suites: what is measured on S and after every step. One function per suite; it returns measures by name.

The positional parameters of a suite name the data that it reads. Log-probs are [N, 2] in nats: the chosen and the
rejected response of N held-out pairs. A suite calls `report` with what it has besides measures.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from sdpo.console import tell
from sdpo.data import prompts as prompt_files
from sdpo.data.preferences import Pair
from sdpo.errors import UserError
from sdpo.evals import answer_formats, benchmarks, generation, held_out_pairs, kl, result_files, reward_model
from sdpo.evals.decoding import Decoding, choose
from sdpo.evals.generation import LIBRARIES
from sdpo.evals.judge import answer_files, protocols
from sdpo.evals.judge.case import Case
from sdpo.evals.judge.chat_endpoint import Endpoint
from sdpo.lab import exam as lab_exam
from sdpo.lab import measures as lab_measures
from sdpo.model import limits
from sdpo.stats import Measures, length_controlled, mean, share, share_above
from sdpo.store.artifacts import Artifact
from sdpo.train.runner import Runner
from sdpo.types import Scored


def preference(scored: Scored, sources: np.ndarray, sets: dict[str, Scored]) -> Measures:
    """What the policy prefers on held-out pairs: alone, against the step's reference, and against S.

    S itself has no reference and is not measured against itself. `preference/gamma_ref` is gamma under the step's
    reference, here on pairs that it was not trained on. `preference/shorter_accuracy` is a baseline: the accuracy of
    always preferring the response with fewer tokens. Sources, and the sets of data.held_out_sets
    (`held_out/<set>/...`), have the measures of BY_SOURCE.
    """
    columns = held_out_pairs.columns(scored)
    measures = {f"preference/{name}": held_out_pairs.mean_of(name, values) for name, values in columns.items()}
    for source in dict.fromkeys(sources):
        for name in held_out_pairs.BY_SOURCE:
            measures[f"preference/{source}/{name}"] = held_out_pairs.mean_of(name, columns[name][sources == source])
    for key, of_set in sets.items():
        columns = held_out_pairs.columns(of_set)
        measures |= {
            f"held_out/{key}/{name}": held_out_pairs.mean_of(name, columns[name]) for name in held_out_pairs.BY_SOURCE
        }
    return measures


def lab(model: Artifact, initial_model: Artifact, exam: lab_exam.Exam | None, runner: Runner) -> Measures:
    """The laboratory's measures: exact gold reward, KL to S and multiple-choice accuracy; nothing on other data.

    Every model gets the same random numbers. For S there is also the gold reward of the best of n answers.
    """
    if exam is None:
        return {}
    load, determinants = runner.load_verified, {"weights": model.key, "exam": asdict(exam), **LIBRARIES}
    measures = runner.store.make_json(
        "evaluation",
        {"suite": "lab", "initial": initial_model.key, "shares": "wilson", **determinants},
        lambda: lab_measures.measure(load(model), load(initial_model), runner.tokenizer, exam),
    )
    if model.key == initial_model.key:
        measures |= runner.store.make_json(
            "evaluation",
            {"suite": "best_of_n", **determinants},
            lambda: lab_measures.best_of_n(load(model), runner.tokenizer, exam),
        )
    return measures


def generate(
    model: Artifact,
    initial_model: Artifact,
    held_out: list[Pair],
    runner: Runner,
    report: Callable[[dict], None],
    *,
    file: str | None = None,
    per_source: int | None = None,
    preset: str | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> Measures:
    """Answers to prompts, which are reported; their lengths; and KL(M_t, S) on answers at temperature 1.

    `file` names a file or a data set of the Hub; None stands for the prompts of the held-out pairs, the first
    `per_source` of each source, without those that have tools, which is told. Settings that are None are those of the
    preset. `generate/ended` is the share of answers that stop before `max_new_tokens`; longer ones, and their KL, are
    cut off there. Raises UserError if there is no prompt.
    """
    prompts = prompt_files.read(file) if file else prompt_files.of_pairs(held_out, per_source)
    if not prompts:
        raise UserError(
            f"evaluate=[generate] has no prompt to ask: none of {len(held_out)} held-out pairs is without tools; set "
            "evaluate.generate.file, or hold pairs out (data.held_out_share)"
        )
    if not file and model.key == initial_model.key and (skipped := sum(bool(pair.inputs) for pair in held_out)):
        tell(f"evaluate=[generate] leaves out {skipped} held-out prompts with tools or settings of the template")
    decoding = choose(preset, temperature, top_p, max_new_tokens, batch_size, seed)
    answers = generation.answers(model, prompts, decoding, runner)
    report(
        {"decoding": {"preset": preset} | decoding._asdict(), "answers": answer_formats.transcripts(prompts, answers)}
    )
    flat = [answer for turns in answers for answer in turns]
    return {
        "generate/kl": mean(np.array(kl.kl_to_initial(model, initial_model, prompts, decoding, runner))),
        "generate/tokens": mean(np.array([len(answer["ids"]) for answer in flat])),
        "generate/ended": share(np.array([answer["ended"] for answer in flat])),
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
    preset: str | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> Measures:
    """How often the reward model at `path` prefers the model's answer to that of S; first turns only.

    The win rate is given as it is, and as it would be at equal length in characters (`sdpo.stats.length_controlled`).
    S itself has no win rate.
    """
    names = ("", "/length_controlled", "/reward_gap", "/longer")
    if model.key == initial_model.key:
        return {f"win_rate{name}": mean([]) for name in names}
    prompts = prompt_files.read(file)
    decoding = choose(preset, temperature, top_p, max_new_tokens, batch_size, seed)
    first_turns = [_first_answers(one, prompts, decoding, runner) for one in (model, initial_model)]
    pairs = [
        Pair(str(prompt.id), prompt.dataset, ({"role": "user", "content": prompt.turns[0]},), *both)
        for prompt, *both in zip(prompts, *first_turns, strict=True)
    ]
    rewards_N2 = reward_model.rewards({"path": path, "revision": revision, "template": template}, pairs, runner)
    gap = rewards_N2[:, 0] - rewards_N2[:, 1]
    wins, longer = share_above(gap), np.array([len(pair.chosen) - len(pair.rejected) for pair in pairs])
    values = (share(wins), length_controlled(wins, longer), mean(gap), mean(longer))
    return {f"win_rate{name}": measure for name, measure in zip(names, values, strict=True)}


def _first_answers(
    model: Artifact, prompts: list[prompt_files.Prompt], decoding: Decoding, runner: Runner
) -> list[str]:
    return [turns[0]["text"] for turns in generation.answers(model, prompts, decoding, runner)]


def judge(
    model: Artifact,
    initial_model: Artifact,
    runner: Runner,
    *,
    file: str,
    url: str,
    model_name: str,
    price_in: float,
    price_out: float,
    max_cost: float,
    protocol: str = "own",
    opponent: str | None = None,
    references: str | None = None,
    key_variable: str = "OPENAI_API_KEY",
    max_tokens: int | None = None,
    concurrency: int = 8,
    timeout: float = 120.0,
    preset: str | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> Measures:
    """What a language model behind an endpoint says of the model's answers; its verdicts are kept in the store.

    `protocol` is of `sdpo.evals.judge.protocols.choose`. All but MT-Bench's compare first turns with those of S, or
    with those of a file `opponent`. S is not compared with itself. Raises UserError as that function and
    `sdpo.evals.judge.chat_endpoint.ask` do, and before anything is asked if the prompts cannot be judged so.
    """
    rules = protocols.choose(protocol, references, opponent)
    endpoint = Endpoint(
        url=url,
        model=model_name,
        key_variable=key_variable,
        max_tokens=rules.asking.max_tokens if max_tokens is None else max_tokens,
        concurrency=concurrency,
        timeout=timeout,
        price_in=price_in,
        price_out=price_out,
        max_cost=max_cost,
        temperature=rules.asking.temperature,
        top_logprobs=rules.asking.top_logprobs,
    )
    prompts = prompt_files.read(file)
    rules.check(prompts)
    decoding = choose(preset, temperature, top_p, max_new_tokens, batch_size, seed)
    theirs, name, of = [], "S", {"weights": model.key}
    if opponent:
        name, answers = answer_files.read(opponent, prompts)
        theirs, of = [turns[0] for turns in answers], of | {"opponent": name}
    elif rules.pairwise:
        if model.key == initial_model.key:
            return rules.measures([], Case([], [], [], name))
        theirs, of = _first_answers(initial_model, prompts, decoding, runner), of | {"initial": initial_model.key}
    ours = [[answer["text"] for answer in turns] for turns in generation.answers(model, prompts, decoding, runner)]
    return protocols.measure(rules, Case(prompts, ours, theirs, name), endpoint, of, runner.store)


def reward_bench(
    model: Artifact,
    initial_model: Artifact,
    runner: Runner,
    *,
    pairs: list[str],
    columns: dict[str, str] | None = None,
    max_tokens: int = 4096,
) -> Measures:
    """How often the implicit reward, which is the log-ratio of the model to S, is higher for the chosen response.

    `pairs` are files or data sets of the Hub. `columns` are as `data.columns`; the column that is called `source` there
    holds the category. A pair of more than `max_tokens` tokens is an error. Log-probs that the store has are read.
    S itself has no implicit reward.
    """
    table = reward_model.read_pairs(pairs, columns, max_tokens, runner)
    runner.store.join()  # the model's folder may not be whole before
    limits.check_rows(table.rows, model.folder, runner.config.model.trust_remote_code)
    ratio_N2 = runner.logprobs(model, table.rows) - runner.logprobs(initial_model, table.rows)
    margin_N = ratio_N2[:, 0] - ratio_N2[:, 1]
    if model.key == initial_model.key:
        margin_N = np.full_like(margin_N, np.nan)
    measures = reward_model.accuracies(share_above(margin_N), table.sources) | {"margin": mean(margin_N)}
    return {f"reward_bench/{name}": measure for name, measure in measures.items()}


def results(t: int, *, files: list[str], run: str) -> Measures:
    """What AlpacaEval, Arena-Hard or MT-Bench found for the model `<run>-M_<t>`, whose answers `generate` wrote.

    Raises UserError if `files` have no model of that run.
    """
    found = result_files.read(files)
    if not any(name.startswith(f"{run}-M_") for name in found):
        raise UserError(f"{', '.join(files)} have no model {run}-M_0, {run}-M_1, ...; they have {', '.join(found)}")
    return found.get(f"{run}-M_{t}", {})


def h4(
    model: Artifact, runner: Runner, *, local: str | None = None, batch_size: int = 8, limit: int | None = None
) -> Measures:
    """ARC, HellaSwag, MMLU, TruthfulQA and their mean: lm-eval's own tasks, with the leaderboard's shots.

    `local` is a folder with copies of the data; `limit` is the largest number of items per task.
    """
    return benchmarks.measure("h4", model, runner, local, batch_size, limit=limit)


def lm_eval(
    model: Artifact,
    runner: Runner,
    *,
    tasks: list[str],
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    fewshot_as_multiturn: bool = True,
    system_instruction: str | None = None,
    gen_kwargs: dict[str, Any] | None = None,
    local: str | None = None,
    batch_size: int = 8,
    limit: int | None = None,
) -> Measures:
    """Any tasks of lm-eval, by name, asked as its command line would with options of these names.

    The chat template is the one that the model was trained with. `num_fewshot` None is each task's own number. The rest
    is as in `h4`.
    """
    asking = {
        "num_fewshot": num_fewshot,
        "apply_chat_template": apply_chat_template,
        "fewshot_as_multiturn": fewshot_as_multiturn,
        "system_instruction": system_instruction,
        "gen_kwargs": gen_kwargs,
    }
    return benchmarks.measure("benchmark", model, runner, local, batch_size, limit=limit, tasks=tasks, asking=asking)
