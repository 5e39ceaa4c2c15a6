"""The paper's experiments as files: every run composes, and what it costs, offline, equals a count by hand."""

import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import CHECKOUT, compose
from test_conf import arms

from analysis import published
from sdpo import validate
from sdpo.config import for_step
from sdpo.errors import UserError
from sdpo.launch import help
from sdpo.plan import flops, report
from sdpo.run import folder as run_folder
from sdpo.run.folder import Run
from sdpo.train.schedule import updates

PATH = ["model.path=me/sft"]  # what only a user knows
ORCA, ULTRA = 129 * 602, 608 * 707  # tokens of a hundredth of the paper's pairs
SMALL = ["data.nominal.orca_dpo_pairs.pairs=129", "data.nominal.ultrafeedback_binarized_cleaned.pairs=608"]
SMALLER = ["data.nominal.ultrafeedback_binarized.pairs=608"]


@pytest.fixture
def foreseen(monkeypatch, tmp_path):
    """foreseen(experiment, *overrides) are the steps of every arm, with neither network nor store.

    With one_in=50, of every source one pair in 50 is planned, which takes as much less time.
    """
    monkeypatch.setenv("SDPO_STORE", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a plan uses no network"))

    def planned(one_in, *overrides):
        config = compose(*overrides)
        nominal = {name: replace(size, pairs=size.pairs // one_in) for name, size in config.data.nominal.items()}
        return replace(config, data=replace(config.data, nominal=nominal))

    def steps(experiment, *overrides, one_in=1):
        commands = arms([f"experiment={experiment}"])
        named = zip(commands, run_folder.labels(commands), strict=True)
        asked = [Run(planned(one_in, *command, *overrides), Path(arm), {}, arm) for command, arm in named]
        for run in asked:
            validate.check(run.config)
        return {one.run.arm: one.steps for one in report.foresee(asked)}

    return steps


def costs(steps):
    return {arm: (len(mine), sum(step.flops for step in mine)) for arm, mine in steps.items()}


def test_table_2_trains_every_pair_three_times_in_every_arm(foreseen):
    three_epochs = pytest.approx((6 * 3 + 2) * 10.73e9 * (ORCA + ULTRA))
    expected = {"easy_to_hard": (2, three_epochs), "random": (2, three_epochs), "stratified": (2, three_epochs)}
    steps = foreseen("paper/table2", *PATH, *SMALL)
    assert costs(steps) == expected | {"all_at_once": (1, three_epochs)}
    assert [step.num_pairs for step in steps["stratified"]] == [123, 614]  # a sixth of 737
    assert len({step.model.key for mine in steps.values() for step in mine}) == 7


def test_table_1_reads_every_reference_once(foreseen):
    steps = foreseen("paper/table1", *SMALL)
    own, large, small = (ULTRA * (18 * 7.24e9 + 2 * size) for size in (7.24e9, 69e9, 7.24e9))
    expected = {"all_at_once": own, "solar_70b": large, "intel_dpo": small}
    models = ("mistral_openorca", "openhermes")
    assert costs(steps) == {
        f"model={model} {arm}": (1, pytest.approx(flops)) for model in models for arm, flops in expected.items()
    }
    assert len({step.model.key for mine in steps.values() for step in mine}) == 6


def test_figures_2_and_3_take_the_sources_in_the_paper_s_order(foreseen):
    steps = foreseen("paper/figure3", *PATH, *SMALL)
    previous, initial = steps["start=previous"], steps["start=initial"]
    assert [step.tokens for step in previous] == [step.tokens for step in initial] == [ORCA, ULTRA]
    assert previous[0].model.key == initial[0].model.key and previous[1].model.key != initial[1].model.key
    (figure_2,) = foreseen("paper/figure2", *PATH, *SMALL).values()
    assert [step.model.key for step in figure_2] == [step.model.key for step in previous]


@pytest.mark.parametrize("model", [["model.path=me/sft"], ["model=mistral_sft"]])
def test_table_4_asks_table_2_s_models_other_questions(foreseen, model):
    asked, other = (foreseen(experiment, *model, *SMALL) for experiment in ("paper/table4", "paper/table2"))
    for arm in ("easy_to_hard", "all_at_once"):
        assert [step.model.key for step in asked[arm]] == [step.model.key for step in other[arm]]


def test_pre_dpo_cuts_its_data_in_two_equal_halves(foreseen):
    steps = foreseen("published/pre_dpo_table3", *PATH, *SMALLER)
    assert [step.num_pairs for step in steps["random"]] == [304, 304]
    one_epoch = pytest.approx(8 * 3.21e9 * ULTRA)
    expected = {"random": (2, one_epoch), "all_at_once": (1, one_epoch)}
    expected |= {"two_epochs": (1, pytest.approx(14 * 3.21e9 * ULTRA))}
    assert {arm: cost for arm, cost in costs(steps).items() if arm in expected} == expected


def test_pre_dpo_has_the_beta_and_the_learning_rate_that_its_table_4_prints():
    step = compose("experiment=published/pre_dpo_table3", *PATH, "arm=baseline/random")
    assert (step.loss["beta"], step.optim.lr) == (0.005, 1e-6)
    both = compose("experiment=published/pre_dpo_simpo_qwen_7b_instruct", "arm=baseline/pre_dpo")
    first, second = (for_step(both, t) for t in (1, 2))
    assert first.loss == {"name": "simpo", "beta": 2.5, "target_margin": 1.2}
    assert (second.loss["name"], second.loss["beta"], second.optim.lr) == ("dpo", 0.1, 6e-7)


OTHERS = [name for name in help.options("experiment") if name.startswith("published/")]
QUICK = ("published/base", "published/snorkel", "published/online_rlhf")  # the others have their kinds


@pytest.mark.parametrize(
    "experiment", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in OTHERS]
)
def test_published_runs_are_planned_offline(foreseen, experiment):
    asked = "path: ???" in (CHECKOUT / "conf" / "experiment" / f"{experiment}.yaml").read_text()
    base = re.sub("_simpo", "", experiment).endswith("_base") or experiment == "published/base"
    steps = foreseen(experiment, *(PATH if asked or base else []), one_in=50)
    assert steps and all(step.num_pairs > 1000 / 50 for mine in steps.values() for step in mine)
    if experiment != "published/base":  # which names no model
        assert all(step.flops > 0 for mine in steps.values() for step in mine)


def test_every_published_run_is_in_a_table_and_every_arm_of_a_table_is_run():
    listed = {table["experiment"]: table["rows"] for table in published.facts("published")}
    assert set(listed) == set(OTHERS) - {"published/base", "published/pre_dpo"}
    for experiment, rows in listed.items():
        run = run_folder.labels(arms([f"experiment={experiment}"]))
        assert {row["arm"] for row in rows if "arm" in row} <= set(run), experiment
        assert {row.get("t", 1) for row in rows} <= {0, 1, 2}
    for table in published.facts("published"):
        assert all(len(row["paper"]) == len(table["columns"]) for row in table["rows"])


def test_the_settings_say_what_the_paper_s_figure_3_shows():
    settings = compose("experiment=paper/sdpo", *PATH)
    assert len(updates(60800, settings.optim, 0)) == 1902  # logged every 10, and 1900 is the last
    tokens = sum(size.pairs * size.tokens for size in settings.data.nominal.values())
    hours = flops.gpu_hours(20 * settings.model.parameters * tokens) / 8
    assert (tokens, round(hours, 2)) == (50_726_718, 3.03)


@pytest.mark.parametrize("experiment", ["paper/sdpo", "paper/table2", "published/pre_dpo_table3"])
def test_a_model_that_was_never_released_is_asked_for(experiment):
    with pytest.raises(UserError, match="model.path has no value; set model.path="):
        compose(f"experiment={experiment}")
