"""lm-eval with a chat template: equal to its own command line, item by item; GSM8K and IFEval on rows of our own."""

import json
from importlib.util import find_spec

import pytest
import torch
import toys
from scipy import stats

pytest.importorskip("lm_eval", reason="benchmarks need lm-eval")
from conftest import needs_bf16
from test_eval_harness import command_line

from sdpo.errors import UserError
from sdpo.evals import eval_harness, suites
from sdpo.evals.eval_harness import Asking
from sdpo.store.artifacts import Store, key_of

RULES = "Answer with the number alone."


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """Questions of our own in the schema of GSM8K."""
    folder = tmp_path_factory.mktemp("gsm8k")
    for split, first in (("train", 3), ("test", 30)):
        rows = [
            {"question": f"Ann has {n} nuts and eats {i + 1}. How many are left?", "answer": f"So.\n#### {n - i - 1}"}
            for i, n in enumerate(range(first, first + 4))
        ]
        (folder / f"gsm8k.{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def ask(monkeypatch):
    """The suite lm_eval on one task, and lm-eval's own results; only the definitions of this task are read."""
    run, seen = eval_harness.run, {}
    monkeypatch.setattr(eval_harness, "run", lambda *given: seen.update(run(*given, log_samples=True)) or seen)

    def asked(inputs, task, local, **options):
        monkeypatch.setattr(eval_harness, "ALL_FOLDERS", (task.split("_")[0],))
        return suites.lm_eval(inputs.initial, inputs.runner, tasks=[task], local=str(local), **options), seen

    return asked


def as_text(value):
    """Log-probs and answers as lm-eval writes them to a file."""
    return [as_text(part) for part in value] if isinstance(value, list | tuple) else str(value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "precision", "multiturn", "generation"),
    [
        ("arc_challenge", "fp32", True, {}),
        pytest.param("arc_challenge", "bf16", False, {}, marks=needs_bf16),
        ("gsm8k", "fp32", True, {"max_gen_toks": 24}),
    ],
)
def test_items_equal_those_of_the_command_line(
    task, precision, multiturn, generation, real_data, real_model, sums, toy, ask, tmp_path
):
    data = sums if task == "gsm8k" else real_data / "eval"
    files = f"data.train=[{toy / 'a.jsonl'}]"
    overrides = (f"model.path={real_model}", "data.template=null", files, f"precision={precision}")
    _, inputs = toys.prepare(toy, tmp_path / "store", *overrides)
    asking = Asking(2, True, multiturn, RULES, generation or None)
    measures, seen = ask(inputs, task, data, batch_size=4, limit=4, **asking._asdict())
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    options = ["--num_fewshot", 2, "--limit", 4, "--batch_size", 4, "--apply_chat_template"]
    options += ["--fewshot_as_multiturn", str(multiturn).lower(), "--system_instruction", RULES]
    options += ["--gen_kwargs", "max_gen_toks=24"] * bool(generation)
    results, samples = command_line(f"pretrained={real_model},dtype={dtype}", data, task, tmp_path, *options)
    metrics = ["acc", "acc_norm"] if task == "arc_challenge" else ["exact_match"]
    ours = seen["samples"][task]
    assert len(ours) == len(samples) == 4 * (2 if task == "gsm8k" else 1)  # GSM8K reads each answer in two ways
    for mine, theirs in zip(ours, samples, strict=True):
        prompts = [request[0] for request in mine["arguments"]]
        assert prompts == [theirs["arguments"][f"gen_args_{i}"]["arg_0"] for i in range(len(prompts))]
        assert RULES in prompts[0] and prompts[0].endswith("<|im_start|>assistant\n")
        assert prompts[0].count("<|im_start|>user") == (3 if multiturn else 1)
        assert [mine[metric] for metric in metrics] == [theirs[metric] for metric in metrics]
        assert as_text(mine["resps"]) == as_text(theirs["resps"])
    for key, value in results.items():
        metric, _, filtering = key.partition(",")
        if filtering and not metric.endswith("_stderr"):
            name = metric if filtering == "none" else f"{metric}/{filtering}"
            assert measures[f"{task}/{name}"]["value"] == value


@pytest.fixture(scope="module")
def prepared(toy, tmp_path_factory):
    return toys.prepare(toy, tmp_path_factory.mktemp("store"), "data.template=chatml")[1]


def test_questions_are_written_with_the_template_of_the_training(prepared, tmp_path, ask):
    (tmp_path / "gsm8k.train.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}))
    (tmp_path / "gsm8k.test.jsonl").write_text(json.dumps({"question": "2 + 3?", "answer": "#### 5"}))
    asking = {"num_fewshot": 1, "system_instruction": "Add.", "gen_kwargs": {"max_gen_toks": 3}}
    measures, seen = ask(prepared, "gsm8k", tmp_path, apply_chat_template=True, **asking)
    turns = [("system", "Add."), ("user", "Question: 1 + 1?\nAnswer:"), ("assistant", "#### 2")]
    turns.append(("user", "Question: 2 + 3?\nAnswer:"))
    text = "".join(f"<|im_start|>{role}\n{words}<|im_end|>\n" for role, words in turns) + "<|im_start|>assistant\n"
    assert seen["samples"]["gsm8k"][0]["arguments"][0][0] == text
    (label,) = {measure["version"] for measure in measures.values()}
    assert label.startswith("gsm8k 3.0, lm-eval 0.4.")
    assert label.endswith(", 1 shots, chat template, shots as turns, system prompt 'Add.', max_gen_toks=3")
    assert set(measures) == {"gsm8k/exact_match/strict-match", "gsm8k/exact_match/flexible-extract"}


def test_sampled_answers_repeat_and_leave_the_random_numbers_of_the_run_alone(prepared, sums, ask):
    warm = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 4}
    state, answers = torch.get_rng_state(), []
    for limit in (2, 3):
        _, seen = ask(prepared, "gsm8k", sums, num_fewshot=0, gen_kwargs=warm, limit=limit, batch_size=1)
        answers.append([sample["resps"] for sample in seen["samples"]["gsm8k"][:2]])
    assert answers[0] == answers[1] and answers[0][0] != answers[0][1]
    assert torch.equal(torch.get_rng_state(), state)


def test_everything_that_changes_a_score_is_in_its_key(prepared, sums, ask):
    runner, keys = prepared.runner, []
    runner = type(runner)(runner.config, Listing(keys), runner.tokenizer)
    base = {"num_fewshot": 0, "limit": 1}
    settings = [{}, {"apply_chat_template": True}, {"system_instruction": "Add."}, {"gen_kwargs": {"max_gen_toks": 3}}]
    settings += [{"fewshot_as_multiturn": False}, {"num_fewshot": 1}, {"limit": 2}, {"batch_size": 2}]
    for setting in settings:
        suites.lm_eval(prepared.initial, runner, tasks=["gsm8k"], local=str(sums), **base | setting)
    runner.numerics.all["precision"] = "bf16"
    suites.lm_eval(prepared.initial, runner, tasks=["gsm8k"], local=str(sums), **base)
    suites.h4(prepared.initial, runner, local=str(sums))
    runner.numerics.all["precision"] = "fp32"
    suites.h4(prepared.initial, runner, local=str(sums))
    assert len(set(keys)) == len(keys) == len(settings) + 3


def test_a_group_gives_its_own_score_and_those_of_its_tasks():
    """Every metric of lm-eval's results is a measure; a standard error that is not known gives no interval."""
    results = {
        "results": {
            "stem": {"alias": "stem", "sample_len": 6, "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,none": 0.25},
            "physics": {"alias": " - physics", "sample_len": 4, "acc,none": 0.25, "acc_stderr,none": 0.1},
            "algebra": {"alias": " - algebra", "sample_len": 2, "acc,strict": 1.0, "acc_stderr,strict": "N/A"},
        },
        "versions": {"physics": 1, "algebra": 2.0},
        "n-shot": {"physics": 5, "algebra": 0},
    }
    results["results"]["stem"]["f1_stderr,none"] = "N/A"
    found = eval_harness._measures(results, Asking())
    values = {name: {metric: measure["value"] for metric, measure in own.items()} for name, own in found.items()}
    assert values == {"stem": {"acc": 0.5, "f1": 0.25}, "physics": {"acc": 0.25}, "algebra": {"acc/strict": 1.0}}
    assert found["physics"]["acc"]["high"] == pytest.approx(0.25 + stats.t.ppf(0.975, 3) * 0.1)
    assert found["algebra"]["acc/strict"]["high"] is None and found["stem"]["f1"]["n"] == 6
    assert found["physics"]["acc"]["version"].startswith("physics 1, lm-eval 0.4.")
    assert found["physics"]["acc"]["version"].endswith(", 5 shots")


class Listing(Store):
    """Lists what it is asked for and makes nothing."""

    def __init__(self, keys):
        self.keys = keys

    def make_json(self, kind, determinants, compute):
        self.keys.append(key_of(kind, determinants))
        return {}


def test_ifeval_reads_answers_or_names_its_missing_package(prepared, tmp_path, monkeypatch, ask):
    row = {"key": 1, "prompt": "Write a line without commas.", "kwargs": [{}]}
    row["instruction_id_list"] = ["punctuation:no_comma"]
    (tmp_path / "ifeval.train.jsonl").write_text(json.dumps(row))  # a row of our own in the schema of IFEval
    (tmp_path / "nltk" / "tokenizers" / "punkt_tab").mkdir(parents=True)  # this row does not read it
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "nltk"))
    options = {"apply_chat_template": True, "gen_kwargs": {"max_gen_toks": 4}}
    if find_spec("langdetect") and find_spec("immutabledict"):
        measures, seen = ask(prepared, "ifeval", tmp_path, **options)
        assert measures["ifeval/prompt_level_strict_acc"]["value"] == (
            "," not in seen["samples"]["ifeval"][0]["resps"][0][0]
        )
    else:
        with pytest.raises(UserError, match=r"^ifeval needs the package (langdetect|immutabledict); the extras of"):
            ask(prepared, "ifeval", tmp_path, **options)
