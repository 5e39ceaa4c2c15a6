"""Benchmarks give lm-eval's own numbers, on local copies of the data, with the model in memory."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest
import torch
import toys
from conftest import CHECKOUT, random_model
from scipy import stats

pytest.importorskip("lm_eval", reason="benchmarks need lm-eval")
from analysis import published
from sdpo.errors import UserError
from sdpo.evals import eval_harness, suites
from sdpo.model import hub

DEFINITIONS = Path(find_spec("lm_eval.tasks").origin).parent
SPLITS = {  # task -> where lm-eval defines it, and its splits in the slices
    "arc_challenge": ("arc/arc_challenge.yaml", ("train", "test")),
    "hellaswag": ("hellaswag/hellaswag.yaml", ("train", "validation")),
    "gsm8k": ("gsm8k/gsm8k.yaml", ("train", "test")),
}


@pytest.fixture(scope="module")
def stories(real_data):
    folder = real_data / "model" / "stories260K"
    return eval_harness.DistributedHFLM(hub.load(folder), hub.load_tokenizer(folder), batch_size=16)


def test_a_share_of_items_has_wilson_s_interval_and_a_mean_student_s():
    # 1 of 5 right: lm-eval's standard error sqrt(.2 * .8 / 4) is .2; a mean of other numbers has a smaller one
    found = {"sample_len": 5, "acc,none": 0.2, "acc_stderr,none": 0.2, "mc2,none": 0.2, "mc2_stderr,none": 0.1}
    given = {"results": {"task": found}, "versions": {"task": 1}, "n-shot": {"task": 0}}
    scores = eval_harness._measures(given, eval_harness.Asking())["task"]
    share = stats.binomtest(1, 5).proportion_ci(method="wilson")
    assert (scores["acc"]["low"], scores["acc"]["high"]) == pytest.approx((share.low, share.high))
    half = 2.776445 * 0.1  # t(.975, 4)
    assert (scores["mc2"]["low"], scores["mc2"]["high"]) == pytest.approx((0.2 - half, 0.2 + half), rel=1e-6)


def test_mmlu_is_the_mean_over_subjects_as_on_the_leaderboard(monkeypatch):
    accuracy = {"mmlu": (0.75, 40), "mmlu_stem": (0.75, 40), "mmlu_anatomy": (0.0, 10), "mmlu_virology": (1.0, 30)}
    given = {
        "results": {
            name: {"sample_len": n, "acc,none": acc, "acc_stderr,none": 0.0} for name, (acc, n) in accuracy.items()
        },
        "versions": {"mmlu": 2},
        "n-shot": {"mmlu": 5},
        "n-samples": {"mmlu_anatomy": {}, "mmlu_virology": {}},
    }
    monkeypatch.setattr(eval_harness, "H4", {"mmlu": (5, "acc")})
    found = eval_harness._of_leaderboard(given)
    assert found["h4"]["value"] == found["h4/mmlu"]["value"] == 0.5 and found["h4/mmlu"]["n"] == 40


def command_line(model, data, task, place, *options):
    """The results and samples of the `lm_eval` command for a task whose rows `datasets` reads from the same files."""
    definition, splits = SPLITS[task]
    files = {split: str(data / f"{task}.{split}.jsonl") for split in splits}
    (place / "task.yaml").write_text(
        f"include: {DEFINITIONS / definition}\ntask: local_{task}\ntag: null\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {json.dumps({'data_files': files})}\n"
    )
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", model, "--device", "cpu"]
    command += ["--tasks", f"local_{task}", "--include_path", str(place), "--log_samples", "--output_path", str(place)]
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(place / "cache"),
        "OMP_NUM_THREADS": "1",
    }  # as ours
    subprocess.run([*command, *map(str, options)], env=env, check=True, capture_output=True)
    (results,), (samples,) = place.glob("**/results_*.json"), place.glob("**/samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(results.read_text())["results"][f"local_{task}"], lines


def best_ending(model, tokenizer, row, by_length):
    """The ending of highest log-prob (per character if `by_length`) after its context; one forward pass per ending."""
    context = tokenizer(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}").input_ids
    scores = []
    for ending in row["endings"]:
        ids = tokenizer(f" {ending}").input_ids
        with torch.no_grad():
            logps = model(torch.tensor([context + ids])).logits[0, len(context) - 1 : -1].log_softmax(-1)
        total = logps[range(len(ids)), ids].sum().item()
        scores.append(total / len(ending) if by_length else total)
    return scores.index(max(scores))


@pytest.mark.parametrize("architecture", ["llama", "mamba", "lfm2"])  # attention, recurrence, and both
@pytest.mark.filterwarnings("ignore:.*kernels", "ignore:.*fast path")
def test_scores_equal_those_of_naive_log_probs(architecture, monkeypatch, tmp_path, tokenizer):
    hybrid = {"layer_types": ["conv", "full_attention"]} if architecture == "lfm2" else {}
    model = random_model(architecture, seed=3, **hybrid)
    rows = [
        {
            "activity_label": "Rowing",
            "ctx_a": f"Boat {i} leaves the pier.",
            "ctx_b": "the crew",
            "endings": [word * (1 + (i + j) % 3) for j, word in enumerate(("row", "sing", "wait", "dive"))],
            "label": str(i % 3),
        }
        for i in range(16)
    ]
    (tmp_path / "hellaswag.validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "hellaswag.train.jsonl").write_text(json.dumps(rows[0]))
    monkeypatch.setattr(eval_harness, "H4_FOLDERS", ("hellaswag",))
    lm = eval_harness.DistributedHFLM(model, tokenizer, batch_size=16)
    state = torch.get_rng_state()
    values = {}
    for metric in ("acc", "acc_norm"):
        monkeypatch.setattr(eval_harness, "H4", {"hellaswag": (0, metric)})
        values[metric] = eval_harness.h4(lm, str(tmp_path), limit=None)["h4"]["value"]
        by_length = metric == "acc_norm"
        right = [best_ending(model, tokenizer, row, by_length) == int(row["label"]) for row in rows]
        assert values[metric] == sum(right) / 16
    assert values["acc"] != values["acc_norm"] and 0 not in values.values()
    assert torch.equal(torch.get_rng_state(), state)  # a benchmark does not change what is trained after it


@pytest.mark.slow
@pytest.mark.parametrize("task", ["arc_challenge", "hellaswag"])
def test_scores_equal_those_of_the_command_line(stories, real_data, task, tmp_path):
    shots, _ = eval_harness.H4[task]
    local = str(real_data / "eval")
    ours = eval_harness.benchmark(stories, local, 60, [task], {"num_fewshot": shots})
    model = f"pretrained={real_data / 'model' / 'stories260K'},dtype=float32"
    options = ("--num_fewshot", shots, "--limit", 60, "--batch_size", 16)
    theirs, _ = command_line(model, real_data / "eval", task, tmp_path, *options)
    for metric in ("acc", "acc_norm"):
        measure = ours[f"{task}/{metric}"]
        assert measure["value"] == theirs[f"{metric},none"] and measure["n"] == 60
        share = stats.binomtest(round(60 * measure["value"]), 60).proportion_ci(method="wilson")
        assert (measure["low"], measure["high"]) == pytest.approx((share.low, share.high), rel=1e-9)


def test_stored_scores_depend_on_model_tokenizer_and_data(toy, tmp_path, real_data, monkeypatch):
    monkeypatch.setattr(eval_harness, "ALL_FOLDERS", ("arc",))  # all folders take ten seconds to read
    _, inputs = toys.prepare(toy, tmp_path / "store")
    runner = inputs.runner

    def num_stored(local):
        suites.lm_eval(inputs.initial, runner, tasks=["arc_challenge"], num_fewshot=0, local=str(local), limit=2)
        return len(list((tmp_path / "store" / "evaluation").iterdir()))

    assert num_stored(real_data / "eval") == 1
    assert num_stored(shutil.copytree(real_data / "eval", tmp_path / "elsewhere")) == 1
    runner.tokenizer.bos_token = runner.tokenizer.eos_token
    assert num_stored(real_data / "eval") == 2


def test_the_paper_s_columns_are_measures_of_h4():
    columns = [source["measure"] for table in published.facts() for source in table["columns"].values()]
    of_h4 = {name for name in columns if name.startswith("h4")}
    assert of_h4 == {"h4", *(f"h4/{task}" for task in eval_harness.H4)}


@pytest.mark.slow
def test_h4_is_the_mean_of_its_four(stories, real_data):
    measures = eval_harness.h4(stories, str(real_data / "eval"), limit=2)
    four = [measures[f"h4/{task}"] for task in eval_harness.H4]
    assert [measure["n"] for measure in four] == [2, 2, 57 * 2, 2] and measures["h4"]["n"] == 120
    assert measures["h4"]["value"] == pytest.approx(sum(measure["value"] for measure in four) / 4, rel=1e-15)
    half = math.sqrt(sum((measure["low"] - measure["value"]) ** 2 for measure in four)) / 4
    assert measures["h4"]["low"] == pytest.approx(measures["h4"]["value"] - half, rel=1e-12)
    assert re.fullmatch(r"mmlu 2, lm-eval 0\.\S+, mean over subjects", measures["h4/mmlu"]["version"])
    json.dumps(measures, allow_nan=False)


RANK = """
import json, sys
from pathlib import Path
import torch.distributed
from sdpo import distributed
from sdpo.evals import eval_harness
from sdpo.model import hub

torch.distributed.init_process_group("gloo")
data = Path(sys.argv[1])
eval_harness.H4, eval_harness.H4_FOLDERS = {"hellaswag": (1, "acc_norm")}, ("hellaswag",)
folder = data / "model" / "stories260K"
lm = eval_harness.DistributedHFLM(hub.load(folder), hub.load_tokenizer(folder), batch_size=16)
found = eval_harness.h4(lm, str(data / "eval"), limit=21)
Path(sys.argv[2], f"{distributed.rank()}.json").write_text(json.dumps(found))
torch.distributed.barrier()
torch.distributed.destroy_process_group()  # else a rank that ends late may fail because the other one is gone
"""


@pytest.mark.slow
def test_two_ranks_score_as_one(stories, real_data, tmp_path, monkeypatch):
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += ["--nproc-per-node=2", str(tmp_path / "rank.py"), str(real_data), str(tmp_path)]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(CHECKOUT)}, check=True, capture_output=True)
    monkeypatch.setattr(eval_harness, "H4", {"hellaswag": (1, "acc_norm")})
    monkeypatch.setattr(eval_harness, "H4_FOLDERS", ("hellaswag",))
    alone = eval_harness.h4(stories, str(real_data / "eval"), limit=21)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [alone, alone]


def question(subject, number):
    return {"subject": subject, "question": f"{subject} {number}?", "choices": list("wxyz"), "answer": number % 4}


def test_a_subject_reads_its_own_rows_and_a_missing_copy_is_named(tmp_path, tokenizer):
    for split, count in (("dev", 2), ("test", 3)):
        rows = [question(subject, i) for i in range(count) for subject in ("anatomy", "virology")]
        (tmp_path / f"mmlu.{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = eval_harness._local_splits(tmp_path, "mmlu_anatomy", "anatomy")
    assert [row["question"] for row in splits["test"]] == ["anatomy 0?", "anatomy 1?", "anatomy 2?"]
    assert splits["dev"].num_rows == 2
    with pytest.raises(UserError, match="no row with subject marketing"):
        eval_harness._local_splits(tmp_path, "mmlu_marketing", "marketing")
    with pytest.raises(UserError, match="no local copy of hellaswag: hellaswag.<split>.jsonl"):
        eval_harness._local_splits(tmp_path, "hellaswag", None)


def test_data_that_cannot_be_reached_is_one_sentence(toy, tmp_path, monkeypatch, tiny_model, tokenizer):
    _, inputs = toys.prepare(toy, tmp_path / "store")
    with pytest.raises(UserError, match=r"^nowhere is not a folder; `local` names one"):
        suites.h4(inputs.initial, inputs.runner, local="nowhere")

    def refuse(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"^the data of arc_.* cannot be loaded \(Couldn't reach the Hub\); "):
        eval_harness.h4(eval_harness.DistributedHFLM(tiny_model, tokenizer, batch_size=16), local=None, limit=None)
