"""On-policy rounds: a step's pairs are the newest model's own answers, judged, and made once."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import compose, random_model, read_lines
from toys import prepare
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from sdpo import export
from sdpo.curriculum import rounds
from sdpo.data.preferences import Pair
from sdpo.errors import UserError
from sdpo.evals import generation
from sdpo.lab import world
from sdpo.plan import report
from sdpo.run.folder import Run
from sdpo.validate import check


@pytest.fixture(scope="module")
def judge(toy, tmp_path_factory):
    """A reward model of random weights."""
    folder = tmp_path_factory.mktemp("judge")
    config = random_model().config
    config.num_labels = 1
    torch.manual_seed(3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(toy / "model").save_pretrained(folder)
    return folder


@pytest.fixture
def on_policy(judge):
    sampled = ["rounds=on_policy", "rounds.answers=3", "rounds.max_new_tokens=5", f"rounds.path={judge}"]
    return [*sampled, "rounds.template=plain", "split=by_source", "evaluate=[]"]


def answers(folder, t):
    return json.loads((folder / "rounds" / f"{t}.json").read_text())


def reward(judge, prompt, answer):
    """The judge's reward for one conversation, by transformers alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(judge), AutoModelForSequenceClassification.from_pretrained(judge)
    ids = tokenizer(prompt + answer, return_tensors="pt")
    with torch.no_grad():
        return float(model.eval()(**ids).logits)


def test_every_step_trains_on_answers_of_the_model_before_it(run, toy, judge, on_policy, monkeypatch):
    folder = run(*on_policy)
    steps = json.loads((folder / "summary.json").read_text())["steps"]
    decided = [[both for both in answers(folder, t) if both] for t in (1, 2, 3)]
    assert [step["num_pairs"] for step in steps] == list(map(len, decided)) and min(map(len, decided)) > 10
    for entry in read_lines(folder, "train"):
        assert entry["update"] > 1 or entry["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(step["reference_leverage"] is not None for step in steps)
    for t, both in ((1, decided[0][0]), (2, decided[1][0])):
        assert both["rewards"][0] > both["rewards"][1]
        assert both["best"]["prompt_ids"] == both["worst"]["prompt_ids"]
        prompt = AutoTokenizer.from_pretrained(judge).decode(both["best"]["prompt_ids"], skip_special_tokens=True)
        for side, expected in zip(("best", "worst"), both["rewards"], strict=True):
            assert reward(judge, prompt, both[side]["text"]) == pytest.approx(expected, abs=1e-5), t
    with pytest.raises(UserError, match=r"step 2 trained on answers of M_1; they are in .*rounds/2.json"):
        export.export_pairs(folder, 2, folder / "pairs.parquet")
    # The same command samples nothing; another loss shares the first round, whose answers are S's.
    sampled = []
    original = generation.generate
    monkeypatch.setattr(generation, "generate", lambda *given: sampled.append(1) or original(*given))
    again = run(*on_policy, name="again")
    assert not sampled and answers(again, 3) == answers(folder, 3)
    run(*on_policy, "loss=ipo", name="ipo")
    assert len(sampled) == 2  # M_1 and M_2 are others


def test_answers_follow_the_newest_model(run, on_policy):
    """At temperature 0.01 the first token's logit is within 0.1 of the largest (chance of another: 300 exp(-10))."""
    folder = run(*on_policy, "optim.lr=1e-2", "rounds.temperature=0.01", "rounds.share=0.5", "reference=initial")
    model = AutoModelForCausalLM.from_pretrained(folder / "steps" / "1").eval()

    def behind(t):
        """How far the answers' first tokens are behind M_1's likeliest ones, in logits."""
        for both in filter(None, answers(folder, t)):
            with torch.no_grad():
                logits = model(torch.tensor([both["best"]["prompt_ids"]])).logits[0, -1]
            yield from (float(logits.max() - logits[both[side]["ids"][0]]) for side in ("best", "worst"))

    assert max(behind(2)) < 0.1 < max(behind(1))


def test_a_share_of_the_prompts_keeps_its_given_pairs(run, on_policy):
    folder = run(*on_policy, "rounds.share=0.5")
    asked = [len(answers(folder, t)) for t in (1, 2, 3)]
    whole = [len(ids) for ids in json.loads((folder / "split.json").read_text())["chunks"]]
    assert asked == [round(0.5 * num) for num in whole]
    steps = json.loads((folder / "summary.json").read_text())["steps"]
    for t, step in enumerate(steps):
        undecided = sum(both is None for both in answers(folder, t + 1))
        assert step["num_pairs"] == whole[t] - undecided
    none = json.loads((run(*on_policy, "rounds.share=0", name="none") / "summary.json").read_text())["steps"]
    assert [step["num_pairs"] for step in none] == whole


def test_the_best_is_compared_with_the_worst_and_a_tie_is_left_out(monkeypatch):
    """By hand: rewards 0, 3, 2, 3 and 0, 0, 0, 0."""
    one = rounds.Round.__new__(rounds.Round)
    one.config = compose("rounds=on_policy_lab")
    pair = Pair("1", "a", ({"role": "user", "content": "?"},), "", "")
    one.asked, one.inputs = SimpleNamespace(pairs=[pair] * 2, rows=[None] * 2), SimpleNamespace(runner=None)
    given = [[{"text": str(i)} for i in range(4)], [{"text": "0"}] * 4]
    worth = {"0": 0.0, "1": 3.0, "2": 2.0, "3": 3.0}
    monkeypatch.setattr(one, "_sample", lambda: given, raising=False)
    monkeypatch.setattr(world, "gold", lambda _, answer: worth[answer])
    first, second = one._judge_answers()
    assert (first["best"]["text"], first["worst"]["text"], first["rewards"]) == ("1", "0", (3.0, 0.0))
    assert second is None
    worth["2"] = math.nan
    with pytest.raises(UserError, match="not a finite number"):
        one._judge_answers()


def test_a_plan_names_the_steps_that_exist_and_those_that_wait_for_answers(toy, run, on_policy, tmp_path):
    folder = run(*on_policy)
    files = ",".join(str(toy / f"{source}.jsonl") for source in "abc")
    base = ["model=local", f"model.path={toy / 'model'}", "data=local", f"data.train=[{files}]"]
    base += ["data.template=plain", "data.held_out_share=0.1", "optim.lr=3e-3", "optim.pairs_per_update=8", *on_policy]
    manifest = json.loads((folder / "manifest.json").read_text())
    keys = [step["key"] for step in manifest["steps"]]

    def planned(*more):
        (plan,) = report.foresee([Run(compose(*base, *more), tmp_path / "planned", choices={}, arm="")])
        return [(step.model.key in keys, step.unknown) for step in plan.steps]

    waits = "the newest model has not answered yet"
    assert planned() == [(True, None)] * 3
    assert planned("loss.beta=0.7") == [(False, None), (False, waits), (False, waits)]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["rounds=on_policy_lab", "rounds.judge=reward_model"], "rounds.path has no value"),
        (
            ["rounds=on_policy_lab", "model=local", "model.path=a", "data=local", "data.train=[a]"],
            "laboratory's reward",
        ),
        (["rounds=on_policy_lab", "reference=external", "reference.path=a"], "does not train on"),
        (["rounds=on_policy_lab", "rounds.share=0.5", "split.within=score"], "use rounds.share=1 or 0"),
    ],
)
def test_what_cannot_be_judged_is_refused(overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        check(compose(*overrides))


def test_a_loss_may_read_rewards_where_the_data_have_no_ratings(toy, on_policy, tmp_path):
    prepare(toy, tmp_path, *on_policy, "loss=odpo")
    with pytest.raises(UserError, match="loss=odpo needs chosen_rating"):
        prepare(toy, tmp_path, *on_policy, "loss=odpo", "rounds.share=0.5")


def test_a_schedule_over_the_run_needs_pairs_that_are_known(run, on_policy):
    with pytest.raises(UserError, match="needs all pairs before the first step"):
        run(*on_policy, "optim.schedule_over=run")


def test_answers_too_long_to_train_on_are_refused(run, on_policy):
    with pytest.raises(UserError, match="more than data.max_tokens=1024: lower the one or raise the other"):
        run(*on_policy, "rounds.max_new_tokens=1020")
