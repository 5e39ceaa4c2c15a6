"""Learning rates and weight decay worked by hand: warm-up, the three schedules, and a schedule over a whole run."""

import pytest
from conftest import read_lines
from safetensors.torch import load_file

from sdpo.config import Optim
from sdpo.train.schedule import learning_rate, updates

WARMUP = [0.25, 0.5, 0.75, 1.0]  # 4 of 10 updates; the other 6 start at the peak and would reach 0 after the last
REST = {
    "linear": [1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6],
    # (1 + cos x) / 2 at x = 0, 30, 60, 90, 120 and 150 degrees; cos 30 is 0.8660254, cos 60 is 0.5.
    "cosine": [1.0, 0.9330127018922193, 0.75, 0.5, 0.25, 0.0669872981077807],
    "constant": [1.0] * 6,
}
UNSEEN = slice(259, 300)  # token ids that stand for no byte: their embeddings get no gradient


def rates(num_updates, **settings):
    optim = Optim(lr=1.0, **settings)
    return [learning_rate(update, num_updates, optim) for update in range(num_updates)]


@pytest.mark.parametrize("schedule", REST)
def test_a_schedule_by_hand(schedule):
    assert rates(10, warmup=0.4, schedule=schedule) == pytest.approx(WARMUP + REST[schedule], abs=1e-15)
    assert rates(6, warmup=0.0, schedule=schedule) == pytest.approx(REST[schedule], abs=1e-15)


def test_a_warm_up_is_rounded_up_to_whole_updates():
    assert rates(5, warmup=0.3) == pytest.approx([1 / 2, 1, 1, 2 / 3, 1 / 3], abs=1e-15)  # 1.5 updates are 2
    assert rates(4, warmup=0.01) == pytest.approx([1, 1, 2 / 3, 1 / 3], abs=1e-15)  # 0.04 is 1
    assert rates(4, warmup=1.0, schedule="cosine") == WARMUP
    assert rates(1, warmup=0.0) == rates(1, warmup=0.1) == [1.0]


def test_the_peak_is_the_learning_rate():
    optim = Optim(lr=4e-6, warmup=0.4)
    assert [learning_rate(update, 10, optim) for update in (0, 3, 4, 7)] == pytest.approx([1e-6, 4e-6, 4e-6, 2e-6])


def test_a_chunk_in_order_is_gone_through_from_its_beginning_in_every_epoch():
    plan = updates(5, Optim(epochs=2, pairs_per_update=2), 0, in_order=True)
    assert [update.tolist() for update in plan] == [[0, 1], [2, 3], [4], [0, 1], [2, 3], [4]]


def logged(folder):
    """The learning rates of every step's updates."""
    entries = read_lines(folder, "train")
    return [[entry["lr"] for entry in entries if entry["t"] == t] for t in sorted({entry["t"] for entry in entries})]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # Three steps of three updates, peak 3e-3. The warm-up of a step is 0.9 updates, rounded up to 1.
        (["optim.warmup=0.3"], [[3e-3, 3e-3, 1.5e-3]] * 3),
        # The warm-up of the run is 2.7 updates, rounded up to 3: the whole first step.
        (
            ["optim.warmup=0.3", "optim.schedule_over=run"],
            [[1e-3, 2e-3, 3e-3], [3e-3, 2.5e-3, 2e-3], [1.5e-3, 1e-3, 0.5e-3]],
        ),
        # The third step has another peak, and the same position in the schedule.
        (
            ["optim.warmup=0.3", "optim.schedule_over=run", "optim.schedule=cosine", "+steps.3.optim.lr=4e-3"],
            [[1e-3, 2e-3, 3e-3], [3e-3, 2.799038105676658e-3, 2.25e-3], [2e-3, 1e-3, 0.267949192431123e-3]],
        ),
    ],
)
def test_the_rates_of_a_run_by_hand(run, overrides, expected):
    found = logged(run("evaluate=[preference]", *overrides))
    assert found == [pytest.approx(step, rel=1e-12) for step in expected]


def test_weight_decay_of_weights_without_a_gradient_by_hand(run, toy):
    """An update multiplies a weight by 1 - lr * weight_decay; 9 updates of which 3 are warm-up."""
    folder = run("split=all_at_once", "optim.warmup=0.3", "optim.weight_decay=10", "evaluate=[preference]")
    left = 0.99 * 0.98 * 0.97 * 0.97 * 0.975 * 0.98 * 0.985 * 0.99 * 0.995
    before, after = (load_file(place / "model.safetensors") for place in (toy / "model", folder / "steps" / "1"))
    name = "model.embed_tokens.weight"
    ratio = after[name][UNSEEN].double() / before[name][UNSEEN].double()
    assert ratio.flatten().tolist() == pytest.approx([left] * ratio.numel(), rel=1e-6)
