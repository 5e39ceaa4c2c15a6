"""The trainer against slow and obvious loops, and the identities that stepwise DPO must keep."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from conftest import compose, needs_bf16, random_model, read_lines
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo import config
from sdpo.config import Data
from sdpo.data import preferences
from sdpo.data.tokenize import encode
from sdpo.model import hub
from sdpo.model.engine import Plain
from sdpo.model.logprobs import Scorer
from sdpo.train.schedule import updates

BETA = 0.1


def losses(folder, t=1):
    return [entry["loss"] for entry in read_lines(folder, "train") if entry["t"] == t]


def weights(folder, t=1):
    return load_file(folder / "steps" / str(t) / "model.safetensors")


def keys(folder):
    return [step["key"] for step in json.loads((folder / "manifest.json").read_text())["steps"]]


def chunks(folder):
    """A run's configuration, and the token rows of every chunk in training order."""
    settings = config.load(folder / "config.yaml")
    tokenizer = AutoTokenizer.from_pretrained(settings.model.path)
    pairs = preferences.load(settings.data).train
    rows, _ = encode(pairs, tokenizer, Data("local", template="plain", max_tokens=1024))
    split = json.loads((folder / "split.json").read_text())
    return settings, [[rows[id] for id in ids] for ids in split["chunks"]]


def naive_dpo(policy, reference, rows, optim, seed, move_every=None, alpha=1.0):
    """DPO as one writes it first: two models, one sequence at a time. Returns the loss before every update."""
    optimizer, plan, history = naive_adamw(policy, optim), naive_plan(len(rows), optim, seed), []
    for number, batch in enumerate(plan):
        if move_every and number and number % move_every == 0:
            with torch.no_grad():
                for theirs, ours in zip(reference.parameters(), policy.parameters(), strict=True):
                    theirs.lerp_(ours, alpha)
        optimizer.param_groups[0]["lr"] = naive_rate(number, len(plan), optim)
        history.append(naive_update(policy, reference, [rows[i] for i in batch], optimizer, optim.clip))
    return history


def naive_adamw(policy, optim):
    return torch.optim.AdamW(policy.parameters(), betas=tuple(optim.betas), weight_decay=optim.weight_decay)


def naive_plan(num_pairs, optim, seed):
    """The indices of each update's pairs: every epoch a permutation of its own, cut off from the front."""
    plan = []
    for epoch in range(optim.epochs):
        left = np.random.default_rng([seed, epoch]).permutation(num_pairs).tolist()
        while left:
            plan.append(left[: optim.pairs_per_update])
            left = left[optim.pairs_per_update :]
    return plan


def naive_rate(number, total, optim):
    """The learning rate of update `number` (from 0): up in equal steps to the peak, then down the schedule."""
    warmup = math.ceil(optim.warmup * total)
    if number < warmup:
        return optim.lr * (number + 1) / warmup
    gone = (number - warmup) / (total - warmup)  # 0 right after the warm-up, 1 after the last update
    if optim.schedule == "linear":
        return optim.lr * (1 - gone)
    if optim.schedule == "cosine":
        return optim.lr * 0.5 * (1 + math.cos(math.pi * gone))
    return optim.lr


def naive_update(policy, reference, rows, optimizer, clip):
    """One update of DPO's mean loss; returns the loss."""
    loss = 0.0
    for row in rows:
        with torch.no_grad():
            gamma_ref = naive_gamma(reference, row)
        loss = loss - logsigmoid(BETA * (naive_gamma(policy, row) - gamma_ref)) / len(rows)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def naive_gamma(model, row):
    """log pi(chosen) - log pi(rejected), one sequence at a time, by the model's own forward pass."""
    chosen, rejected = (naive_sum(model, row.prompt, response) for response in (row.chosen, row.rejected))
    return chosen - rejected


def naive_sum(model, prompt, response):
    ids = torch.tensor([*prompt, *response], dtype=torch.long)
    logps = model(input_ids=ids[None]).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    return logps.gather(1, ids[len(prompt) :, None]).sum()


def start_model(settings):
    """The model that a run starts from, in fp64: what separates it from the run is the run's own rounding."""
    return AutoModelForCausalLM.from_pretrained(settings.model.path, dtype=torch.float64)


def rounding_of_a_loss(model, rows):
    """How far fp32 may put a mean DPO loss off: a margin is made of four sums, each of which is rounded to half a unit
    in the last place, and the loss moves by at most beta a nat."""
    with torch.no_grad():
        largest = max(-naive_sum(model, row.prompt, part).item() for row in rows for part in (row.chosen, row.rejected))
    return BETA * 4 * float(np.spacing(np.float32(largest))) / 2


def test_all_at_once_is_plain_dpo(run):
    folder = run("split=all_at_once", "reference=initial", "optim.epochs=2")
    settings, (rows,) = chunks(folder)
    policy = start_model(settings)
    expected = naive_dpo(policy, copy.deepcopy(policy), rows, settings.optim, settings.seed)
    assert losses(folder) == pytest.approx(expected, abs=1e-5)
    assert min(expected) < 0.67  # it learned something
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor.double(), policy.state_dict()[name], atol=1e-5, rtol=0)


def test_weight_decay_and_a_cosine_are_those_of_adamw(run):
    folder = run("split=all_at_once", "optim.weight_decay=0.1", "optim.schedule=cosine")
    settings, (rows,) = chunks(folder)
    policy = start_model(settings)
    expected = naive_dpo(policy, copy.deepcopy(policy), rows, settings.optim, settings.seed)
    assert (settings.optim.weight_decay, settings.optim.schedule, len(expected)) == (0.1, "cosine", 9)
    assert losses(folder) == pytest.approx(expected, abs=1e-5)
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor.double(), policy.state_dict()[name], atol=1e-5, rtol=0)


def test_stepwise_dpo_is_dpo_again_and_again_from_the_last_model(run):
    folder = run("optim.epochs=2")
    settings, steps = chunks(folder)
    policy = start_model(settings)
    assert len(steps) == 3
    for t, rows in enumerate(steps, start=1):
        expected = naive_dpo(policy, copy.deepcopy(policy), rows, settings.optim, settings.seed)
        assert losses(folder, t) == pytest.approx(expected, abs=1e-5)


def test_the_first_margins_of_every_step_are_exactly_zero(run):
    folder = run("launch.tokens_per_pack=300")
    first = [entry for entry in read_lines(folder, "train") if entry["update"] == 1]
    assert [(entry["margin"], entry["lambda_mean"], entry["lambda_std"]) for entry in first] == [(0.0, 0.5, 0.0)] * 3
    assert [entry["loss"] for entry in first] == pytest.approx([np.log(2)] * 3, abs=1e-7)


def test_one_step_has_one_key_whatever_the_rule_is_called(run):
    one = ["split=all_at_once"]
    names = ["reference=initial", "reference=previous", "reference=average"]
    names += ["reference=periodic reference.updates=99", "reference=mixed reference.updates=99 reference.alpha=0.3"]
    found = {keys(run(*one, *name.split(), name=f"run{i}"))[0] for i, name in enumerate(names)}
    assert len(found) == 1


@pytest.mark.parametrize(("rule", "alpha"), [("periodic", 1.0), ("mixed", 0.6)])
def test_a_moving_reference_equals_a_second_model_that_is_moved(run, rule, alpha):
    more = [] if rule == "periodic" else [f"reference.alpha={alpha}"]
    folder = run("split=all_at_once", f"reference={rule}", "reference.updates=3", "optim.epochs=2", *more)
    settings, (rows,) = chunks(folder)
    policy = start_model(settings)
    expected = naive_dpo(policy, copy.deepcopy(policy), rows, settings.optim, settings.seed, 3, alpha)
    assert losses(folder) == pytest.approx(expected, abs=rounding_of_a_loss(start_model(settings), rows))


def test_mixing_at_alpha_one_is_the_periodic_rule(run):
    mixed = run("reference=mixed", "reference.alpha=1.0", "reference.updates=2", name="mixed")
    assert keys(mixed) == keys(run("reference=periodic", "reference.updates=2", name="periodic"))


def test_a_reference_with_a_bound_moves_as_soon_as_it_is_passed(run):
    """Any distance passes a tiny bound, and right after a move it is 0: every second update has a new one."""
    whole, rest = "split=all_at_once", ["record.every=3", "probe.every=0"]
    bounded = run(whole, "reference=until_kl", "reference.bound=1e-12", *rest, name="bounded")
    every_other = run(whole, "reference=periodic", "reference.updates=2", *rest, name="every_other")
    assert losses(bounded) == losses(every_other) and keys(bounded) != keys(every_other)
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (bounded, every_other)]
    moved, given = (manifest["steps"][0]["windows"] for manifest in manifests)
    for name in ("num_updates", "weights"):
        assert [window[name] for window in moved] == [window[name] for window in given]
    far = run(whole, "reference=until_kl", "reference.bound=1e9", *rest, name="far")
    assert losses(far) == losses(run(whole, "reference=initial", *rest, name="fixed"))


def test_how_an_update_is_cut_into_micro_batches_changes_nothing(run, monkeypatch, tmp_path):
    whole = run("split=all_at_once", name="whole")
    monkeypatch.setenv("SDPO_STORE", str(tmp_path / "another"))
    cut = run("split=all_at_once", "launch.tokens_per_pack=100", name="cut")
    assert losses(cut) == pytest.approx(losses(whole), abs=1e-6)


def test_pre_dpo_is_the_same_data_twice_with_the_first_result_as_guide(run):
    folder = run("split=repeat", "split.num=2", "start=initial", "reference=previous")
    settings, (first, second) = chunks(folder)
    guide = start_model(settings)
    expected = naive_dpo(guide, start_model(settings), first, settings.optim, settings.seed)
    assert losses(folder, 1) == pytest.approx(expected, abs=1e-5)
    policy = start_model(settings)
    assert losses(folder, 2) == pytest.approx(naive_dpo(policy, guide, second, settings.optim, settings.seed), abs=1e-5)


def test_the_same_command_trains_nothing_and_a_shared_prefix_is_shared(run):
    first = run(name="first")
    again = json.loads((run(name="again") / "summary.json").read_text())
    assert (again["trained_steps"], again["reused_steps"]) == (0, 3)
    other = run("+steps.3.optim.lr=1e-4", name="other")
    assert keys(other)[:2] == keys(first)[:2] and keys(other)[2] != keys(first)[2]
    assert json.loads((other / "summary.json").read_text())["trained_steps"] == 1


def test_the_order_of_pairs_depends_on_the_seed_alone(run):
    optim = config.Optim(epochs=2, pairs_per_update=5)
    plan = updates(12, optim, seed=0)
    assert [update.tolist() for update in plan] == naive_plan(12, optim, seed=0)
    assert [len(update) for update in plan] == [5, 5, 2] * 2
    assert sorted(np.concatenate(plan[:3])) == sorted(np.concatenate(plan[3:])) == list(range(12))
    assert [u.tolist() for u in plan] == [u.tolist() for u in updates(12, optim, seed=0)]
    assert [u.tolist() for u in plan] != [u.tolist() for u in updates(12, optim, seed=1)]


def test_two_carried_halves_of_one_schedule_are_one_step(run):
    """Splitting D in two with the reference, moments and schedule carried over is training on D in that order."""
    carried = ["reference=initial", "optim.moments=carry", "optim.schedule_over=run", "split=by_source"]
    folder = run(*carried)
    settings, steps = chunks(folder)
    policy = start_model(settings)
    optimizer = naive_adamw(policy, settings.optim)
    reference, number, expected = copy.deepcopy(policy), 0, []
    plans = [naive_plan(len(rows), settings.optim, settings.seed) for rows in steps]
    for rows, plan in zip(steps, plans, strict=True):
        for batch in plan:
            optimizer.param_groups[0]["lr"] = naive_rate(number, sum(map(len, plans)), settings.optim)
            expected.append(naive_update(policy, reference, [rows[i] for i in batch], optimizer, settings.optim.clip))
            number += 1
    found = [loss for t in (1, 2, 3) for loss in losses(folder, t)]
    assert found == pytest.approx(expected, abs=1e-5)


@needs_bf16
def test_bf16_has_fp32_masters_so_that_small_learning_rates_move_weights(run, toy):
    folder = run("split=all_at_once", "precision=bf16", "optim.lr=5e-7")
    first = read_lines(folder, "train")[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-3)
    before, after = load_file(toy / "model" / "model.safetensors"), weights(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (before[name] != after[name]).float().mean()
    assert after[name].dtype == torch.float32 and moved > 0.99
    assert (before[name].bfloat16() != after[name].bfloat16()).float().mean() < 0.1  # what bf16 alone would lose


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_bf16_leaves_rotary_frequencies_as_from_pretrained_does(tmp_path, architecture):
    """As DeepSpeed does, too: both engines score for one table of log-probs."""
    random_model(architecture).save_pretrained(tmp_path)
    scorer = Scorer(hub.load(tmp_path))
    Plain(scorer, compose().optim, "bf16", torch.device("cpu"))
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {param.dtype for param in scorer.parameters()} == {torch.bfloat16}
    theirs = {name: buffer for name, buffer in peer.named_buffers() if name.endswith("inv_freq")}
    ours = dict(scorer.model.named_buffers())
    assert bool(theirs) is (architecture != "gpt2")
    for name, frequencies in theirs.items():
        torch.testing.assert_close(ours[name], frequencies, rtol=0, atol=0)


def test_a_step_counts_tokens_once_and_says_how_fast_it_was(run):
    folder = run("split=all_at_once", "optim.epochs=2", name="first")
    _, (rows,) = chunks(folder)
    unique = sum(len(row.prompt) + len(row.chosen) - 1 + len(row.rejected) - 1 for row in rows)
    entries = read_lines(folder, "train")
    assert sum(entry["tokens"] for entry in entries) == 2 * unique
    for again in (folder, run("split=all_at_once", "optim.epochs=2", name="again")):
        (step,) = read_lines(again, "step")
        assert step["tokens_per_second"] == pytest.approx(2 * unique / sum(entry["seconds"] for entry in entries))
        assert step["utilisation"] is None  # no known GPU
