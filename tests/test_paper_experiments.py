"""The paper's experiments as files: every run composes, and what it costs, offline, equals a count by hand."""

import socket
from pathlib import Path

import pytest
from conftest import compose
from test_conf import arms

from sdpo import validate
from sdpo.errors import UserError
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
    """foreseen(experiment, *overrides) are the steps of every arm, with neither network nor store."""
    monkeypatch.setenv("SDPO_STORE", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a plan uses no network"))

    def steps(experiment, *overrides):
        commands = arms([f"experiment={experiment}"])
        named = zip(commands, run_folder.labels(commands), strict=True)
        asked = [Run(compose(*command, *overrides), Path(arm), {}, arm) for command, arm in named]
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
    assert costs(steps) == {"random": (2, one_epoch), "all_at_once": (1, one_epoch)}


def test_the_settings_say_what_the_paper_s_figure_3_shows():
    settings = compose("experiment=paper/sdpo", *PATH)
    assert len(updates(60800, settings.optim, 0)) == 1902  # logged every 10, and 1900 is the last
    tokens = sum(size.pairs * size.tokens for size in settings.data.nominal.values())
    hours = flops.gpu_hours(20 * settings.model.parameters * tokens) / flops.GPUS
    assert (tokens, round(hours, 2)) == (50_726_718, 3.03)


@pytest.mark.parametrize("experiment", ["paper/sdpo", "paper/table2", "published/pre_dpo_table3"])
def test_a_model_that_was_never_released_is_asked_for(experiment):
    with pytest.raises(UserError, match="model.path has no value; set model.path="):
        compose(f"experiment={experiment}")
