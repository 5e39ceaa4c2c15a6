"""Plans agree with the runs that they describe, placeholders with real pairs; costs are worked by hand."""

import json
import math
import socket
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import compose, random_model
from huggingface_hub import constants
from peft import LoraConfig, inject_adapter_in_model

from sdpo import stepwise
from sdpo.errors import UserError
from sdpo.launch.order import by_first_missing_step
from sdpo.plan import flops, report
from sdpo.run.folder import Run
from sdpo.store.artifacts import Artifact
from sdpo.train import throughput
from sdpo.train.reference_windows import Windows
from sdpo.train.step_key import StepSpec
from sdpo.types import Chunk, TokenPair

NOWHERE = ["model=hub", "model.path=nobody/nothing"]


@pytest.fixture
def asked(toy, tmp_path, monkeypatch):
    """asked(arm, *overrides) are the runs of an arm on two sources of the toy; the store is empty."""
    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "store"))
    files = ",".join(str(toy / f"{source}.jsonl") for source in "ab")
    base = ["model=local", f"model.path={toy / 'model'}", "data=local", f"data.train=[{files}]"]
    base += ["data.template=plain", "data.held_out_share=0.1", "optim.pairs_per_update=24"]

    def ask(arm, *overrides, seeds=1):
        settings = compose(*base, *overrides)
        runs = [replace(settings, seed=seed) for seed in range(seeds)]
        return [Run(run, tmp_path / f"{arm}-{run.seed}", choices={}, arm=arm) for run in runs]

    return ask


def train(run):
    """The keys of a run's steps, from its manifest after it ran."""
    run.prepare()
    stepwise.run(run.config, run.folder)
    return [step["key"] for step in json.loads((run.folder / "manifest.json").read_text())["steps"]]


def keys(run):
    """The keys of a run's steps before it runs."""
    (foreseen,) = report.foresee([run])
    assert not any(step.unknown for step in foreseen.steps)
    return [step.model.key for step in foreseen.steps]


def pattern(runs):
    """For each step the first step with the same key; then number and size of each step."""
    steps = [step for one in report.foresee(runs) for step in one.steps]
    names = [step.model.key for step in steps]
    return [names.index(name) for name in names], [(step.t, step.num_pairs) for step in steps]


def last_words(runs):
    return report.text(report.foresee(runs)).split("\n\n")[-1].splitlines()


def test_what_is_planned_is_what_is_trained(asked):
    runs = [*asked("moving", "split=random", seeds=2), *asked("fixed", "split=random", "reference=initial", seeds=2)]
    # For each seed one first step of both arms, and a second step of each.
    assert last_words(runs)[0] == "0 of 6 steps of the arms exist; 6 will be trained (2 shared by several arms)"
    planned = [keys(run) for run in runs]
    assert train(runs[0]) == planned[0]
    assert last_words(runs)[0] == "2 of 6 steps of the arms exist; 4 will be trained (1 shared by several arms)"
    assert [train(run) for run in runs[1:]] == planned[1:]
    assert last_words(runs) == ["6 of 6 steps of the arms exist; 0 will be trained"]


def test_what_scores_decide_is_known_once_they_exist(asked, tmp_path):
    settings = ["split=easy_to_hard", "split.level=pair", "split.num_chunks=2", "score.model=current"]
    (run,) = asked("scored", *settings)
    (before,) = report.foresee([run])
    assert {step.unknown for step in before.steps} == {"the pairs are not scored yet"}
    assert not (tmp_path / "store").exists()
    assert train(run) == keys(run)
    (after,) = report.foresee([run])
    log = json.loads((run.folder / "steps" / "2" / "train.json").read_text())
    assert after.steps[1].seconds == sum(entry["seconds"] for entry in log["entries"]) > 0


def test_an_order_inside_a_chunk_is_known_once_the_scores_are(asked):
    kept = ["split=all_at_once", "split.within=score"]
    (easy,), (shuffled,) = asked("easy", *kept), asked("shuffled", *kept, "split.within=shuffled")
    assert [step.unknown for step in report.foresee([easy])[0].steps] == ["the pairs are not scored yet"]
    assert train(easy) == keys(easy) != keys(shuffled)
    split, scores = json.loads((easy.folder / "split.json").read_text()), pd.read_parquet(easy.folder / "pairs.parquet")
    in_order = scores.set_index("id")["score"][split["chunks"][0]].tolist()
    assert in_order == sorted(in_order, reverse=True) and len(in_order) > 20


def test_models_that_scores_need_are_planned_apart(asked):
    (run,) = asked("selective", "split=all_at_once", "split.keep=0.5", "score=validation_loss", "score.repeats=1")
    (before,) = report.foresee([run])
    train(run)
    (after,) = report.foresee([run])
    assert [step.model.key for step in before.for_scores] == [step.model.key for step in after.for_scores]
    assert [(step.num_pairs, step.model.reused) for step in before.for_scores] == [(21, False), (22, False)]
    assert all(step.model.reused for step in after.for_scores)


def test_the_first_step_is_one_whatever_moves_later(asked):
    names = ["previous", "initial", "average", "periodic"]
    runs = [run for name in names for run in asked(name, "split=all_at_once", f"reference={name}")]
    assert last_words(runs)[0] == "0 of 1 steps of the arms exist; 1 will be trained (1 shared by several arms)"


def test_placeholders_are_shared_like_real_pairs_without_a_download(asked, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a plan uses no network"))
    arms = [["split=random"], ["split=random", "reference=initial"], ["split=repeat", "start=initial"]]
    arms += [["split=stratified", "split.num_chunks=1"]]
    known = [run for arm in arms for run in asked("known", *arm, seeds=2)]
    unknown = [run for arm in arms for run in asked("unknown", *arm, *NOWHERE, seeds=2)]
    assert pattern(known) == pattern(unknown) and not constants.HF_HUB_OFFLINE
    words = last_words(unknown)
    assert words[1].startswith("a model's size is not known: set model.parameters")
    assert words[2].endswith("8 of 8 runs are not known yet, because nobody/nothing is not on this machine:")


def test_orders_that_are_not_known_are_shared_where_they_must_be_and_nowhere_else(asked):
    settings = ["split.level=pair", "split.num_chunks=2", "reference=initial", "start=initial"]
    runs = [run for split in ("easy_to_hard", "hard_to_easy") for run in asked(split, f"split={split}", *settings)]
    runs += asked("other", "split=easy_to_hard", "score=gamma_per_token", *settings)
    # The second order is the reverse of the first, and no step depends on an earlier one. Another score: another order.
    assert pattern(runs)[0] == [0, 1, 1, 0, 4, 5]


def test_all_pairs_are_known_even_if_their_order_is_not(asked):
    everything = asked("known", "split=all_at_once")
    ordered = asked("ordered", "split=easy_to_hard", "split.level=pair", "split.num_chunks=1")
    for runs in (everything + ordered, ordered + everything):
        (step,) = report.distinct(step for one in report.foresee(runs) for step in one.steps).values()
        assert step.unknown is None


def test_the_laboratory_is_planned_before_anything_of_it_exists(monkeypatch, tmp_path):
    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "store"))
    settings = [compose("experiment=smoke", "split=by_source", f"reference={name}") for name in ("previous", "initial")]
    runs = [Run(one, tmp_path / one.reference["name"], choices={}, arm=one.reference["name"]) for one in settings]
    (initial,) = report.distinct(step for one in report.foresee(runs) for step in one.initial).values()
    lab = settings[0].data.lab
    assert (initial.t, initial.num_pairs, initial.unknown) == (0, lab.num_demonstrations, None)
    sizes = [(t, source.num_pairs) for t, source in enumerate(lab.sources.values(), start=1)]
    planned = pattern(runs)
    assert planned == ([0, 1, 2, 0, 4, 5], 2 * sizes) and not (tmp_path / "store").exists()
    names = [key for run in runs for key in train(run)]
    assert [names.index(name) for name in names] == planned[0]
    assert json.loads((runs[0].folder / "manifest.json").read_text())["model_key"] == initial.model.key
    assert last_words(runs) == ["5 of 5 steps of the arms exist; 0 will be trained"]


def test_a_data_set_that_is_not_here_has_the_size_that_the_settings_give_it(asked):
    hub = ["data=hub", "data.train=[me/one,me/one/other:test]", "data.held_out_share=0.25", *NOWHERE]
    sizes = "+data.nominal={one: {pairs: 100, tokens: 7}, one-other: {pairs: 40, tokens: 5}}"
    with pytest.raises(
        UserError,
        match="one, one-other: not on this machine; give the plan the sizes, .*{one: {pairs: .*, one-other: {",
    ):
        report.foresee(asked("a", *hub))
    (foreseen,) = report.foresee(asked("a", *hub, sizes))
    assert [(step.num_pairs, step.tokens) for step in foreseen.steps] == [(75, 525), (30, 150)]


def chunk_of(num_pairs, tokens):
    rows = [TokenPair(str(i), np.zeros(tokens - 4), np.zeros(3), np.zeros(3)) for i in range(num_pairs)]
    return Chunk(rows, np.zeros((num_pairs, 2)), probes=rows[:1])


@pytest.mark.parametrize(
    ("overrides", "lengths", "operations"),
    [
        # 4 pairs of 5 tokens in updates of 2: 2 epochs forward and backward cost 2 * 6 * 20 operations per weight,
        # and a reference that scores the chunk once costs 2 * 20.
        ([], [4], 240 + 40),
        (["reference=none", "loss=simpo"], [], 240),
        (["tune=lora"], [4], 160 + 40),
        # The windows of the second update and of the last two hold 2 and 4 pairs; there is one probe pair.
        (["reference=periodic"], [1, 1, 2], 240 + 40 + 20 + 40 + 2 * 10),
        (["probe.every=1"], [4], 240 + 40 + 3 * 10),
        (["reference=external", "reference.path=x", "reference.parameters=7000"], [4], 240 + 280),
        (["reference=external", "reference.path=x"], [4], math.nan),
    ],
)
def test_operations_of_a_step(tmp_path, overrides, lengths, operations):
    size = ["model=hub", "model.path=x", "model.parameters=1000", "data=hub", "data.train=[x]"]
    settings = compose(*size, "optim.epochs=2", "optim.pairs_per_update=2", *overrides)
    windows = Windows([{"num_updates": length, "weights": {}} for length in lengths], None)
    initial = Artifact("", tmp_path, reused=False)
    spec = StepSpec(1, settings, initial, [initial], chunk_of(4, 5))
    assert flops.flops_of_step(spec, windows) == pytest.approx(1000 * operations, nan_ok=True)


def test_weights_are_counted_where_a_model_is(toy, tiny_model, tmp_path):
    settings = compose()
    assert flops.count_parameters(settings, Artifact("", toy / "model", reused=True)) == tiny_model.num_parameters()
    assert 1.5e5 < flops.count_parameters(settings, Artifact("", tmp_path, reused=False)) < 1.8e5  # the laboratory's


def test_weights_that_are_only_looked_up_and_those_of_adapters_cost_nothing(tiny_model):
    num_weights = tiny_model.num_parameters() - 300 * 32
    assert throughput.multiplied(tiny_model) == num_weights
    adapted = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), random_model())
    assert throughput.multiplied(adapted) == num_weights
    tied = random_model(tie_word_embeddings=True)
    assert throughput.multiplied(tied) == tied.num_parameters()


def test_utilisation_counts_the_reference_pass_where_it_was_made(monkeypatch):
    settings = compose("precision=bf16")
    trained, scored, none = throughput.Pace(6000, 30.0), throughput.Pace(2000, 10.0), throughput.Pace(0, 0.0)
    assert throughput.speed(settings, 1000, trained, scored)[:2] == (200.0, None)  # no known GPU here
    monkeypatch.setattr(throughput, "peak", lambda device: 2e6)
    assert throughput.speed(settings, 1000, trained, scored)[:2] == (200.0, 20 * 2000 * 1000 / 40 / 2e6)  # (6 E + 2) N
    assert throughput.speed(settings, 1000, trained, none)[:2] == (200.0, 6 * 6000 * 1000 / 30 / 2e6)
    assert throughput.speed(compose("precision=bf16", "tune=lora"), 1000, trained, none).utilisation == 0.4
    assert throughput.speed(compose(), 1000, trained, scored).utilisation is None  # the peak is that of bf16


def test_hours_of_the_paper_s_data_on_eight_gpus():
    # 12.9k + 60.9k pairs, 51M tokens, 10.7B weights, 3 epochs: 2.4 hours at 50 % of the peak, so 3.0 at 40 %.
    assert flops.gpu_hours(20 * 10.73e9 * 51e6) / 8 == pytest.approx(2.4 * 50 / 40, rel=0.02)


def test_a_sweep_starts_runs_that_need_another_step_first(asked):
    moving, fixed = (
        asked("moving", "split=random", seeds=2),
        asked("fixed", "split=random", "reference=initial", seeds=2),
    )

    def in_turn(runs):
        return [turn.run for turn in by_first_missing_step(runs)]

    # Both arms begin with the same step for each seed.
    runs = [moving[0], fixed[0], moving[1], fixed[1]]
    assert in_turn(runs) == [moving[0], moving[1], fixed[0], fixed[1]]
    train(moving[0])
    # Now moving 0 misses nothing and fixed 0 a step of its own.
    assert in_turn(runs) == [moving[0], fixed[0], moving[1], fixed[1]]
    broken = runs[3]._replace(config=replace(runs[3].config, data=replace(runs[3].config.data, train=["nowhere"])))
    assert in_turn([*runs[:3], broken]) == [*runs[:3], broken]
