"""What the user sees while a run works: a bar on a terminal, plain lines elsewhere, and lines of text."""

import io
import sys
import threading
from types import SimpleNamespace

import pytest

from sdpo.console import Progress, columns, step_line


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def watched(monkeypatch):
    """watched(stream) makes `stream` stderr and returns a clock whose `now` is the time of all progress."""

    def watch(stream):
        clock = SimpleNamespace(now=100.0)
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr("tqdm.std.time", lambda: clock.now)
        monkeypatch.setattr("time.monotonic", lambda: clock.now)
        return clock

    return watch


def test_a_terminal_gets_a_bar_after_two_seconds_and_no_thread(watched):
    screen = Terminal()
    clock = watched(screen)
    num_threads = threading.active_count()
    with Progress(10, "step 1", done=2) as bar:
        bar.advance(2, tokens=400)
        bar.show("loss 0.5000")
        assert screen.getvalue() == ""
        clock.now += 4
        bar.advance(2, tokens=400)
        # 4 pairs and 800 tokens in 4 s, without the 2 pairs that were done before; 4 pairs remain
        assert "step 1:  60%" in screen.getvalue()
        assert "| 6/10 [00:04<00:04, 1 pairs/s, 200 tokens/s, loss 0.5000]" in screen.getvalue()
    assert threading.active_count() == num_threads
    assert screen.getvalue().rpartition("loss 0.5000]")[2].strip() == ""  # the bar is wiped


def test_without_a_terminal_a_line_every_thirty_seconds(watched):
    log = io.StringIO()
    clock = watched(log)
    with Progress(1000, "step 1", done=100) as bar:
        bar.advance(100, tokens=500)
        bar.show("loss 0.5000")
        clock.now += 29
        bar.advance(100, tokens=500)
        assert log.getvalue() == ""
        clock.now += 1
        bar.advance(100, tokens=500)
        # 300 pairs and 1500 tokens in 30 s; the other 600 pairs take 60 s
        first = "step 1: 400 of 1000 pairs, 10 pairs/s, 50 tokens/s, loss 0.5000, 01:00 left\n"
        assert log.getvalue() == first
        clock.now += 29
        bar.advance(1)
        assert log.getvalue() == first
        clock.now += 1
        bar.advance(299)
    assert log.getvalue() == first + "step 1: 700 of 1000 pairs, 10 pairs/s, 25 tokens/s, loss 0.5000, 00:30 left\n"


def test_a_sweep_counts_runs_and_knows_no_rate_at_first(watched):
    log = io.StringIO()
    clock = watched(log)
    with Progress(4, "demo", "runs", done=1) as bar:
        clock.now += 60
        bar.update(0)
        clock.now += 60
        bar.update()
    assert log.getvalue() == "demo: 1 of 4 runs, ? left\ndemo: 2 of 4 runs, 120 s each, 04:00 left\n"


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_other_ranks_print_nothing(watched, stream, monkeypatch):
    clock = watched(stream)
    monkeypatch.setenv("RANK", "1")
    with Progress(2, "step 1") as bar:
        clock.now += 1e6
        bar.advance(1, tokens=5)
        bar.advance(1, tokens=5)
    assert stream.getvalue() == ""


def test_step_line():
    step = {
        "t": 2,
        "num_pairs": 519,
        "sources": {"orca": 500, "polite": 19},
        "first_loss": 0.69314718,
        "last_loss": 0.5,
        "gamma_ref_mean": -12.25,
        "tokens_per_second": 4321.5,
        "utilisation": None,
        "runs_on_gpu": None,
        "reused": False,
        "eval": {"preference/ranking_accuracy": {"value": 0.75, "low": None, "high": 0.8, "n": 9}},
    }
    assert step_line(step) == (
        "step 2  519 pairs of orca, polite  loss 0.6931 -> 0.5  gamma_ref -12.25  "
        "4322 tokens/s  preference/ranking_accuracy 0.75 [-, 0.8]"
    )
    asked = {
        "h4": {"value": 0.5, "low": 0.25, "high": 0.75, "n": 9},
        "h4/mmlu": {"value": 1, "low": 0, "high": 1, "n": 9},
    }
    assert step_line(step | {"eval": step["eval"] | asked}).endswith("0.75 [-, 0.8]  h4 0.5 [0.25, 0.75]")
    assert step_line(step | {"gamma_ref_mean": None, "eval": {}}).endswith("gamma_ref -  4322 tokens/s")
    found = step_line(step | {"last_loss": 0.6931471, "reused": True, "eval": {}})  # with one update, one loss
    assert found.endswith("loss 0.6931  gamma_ref -12.25  found in the store, trained at 4322 tokens/s")
    assert step_line(step | {"utilisation": 0.414, "eval": {}}).endswith("4322 tokens/s at 41% of the peak")
    shared = {"runs_on_gpu": 3, "eval": {}}
    assert step_line(step | shared).endswith("4322 tokens/s beside 2 other runs on the GPU")
    assert step_line(step | shared | {"runs_on_gpu": 1}).endswith("4322 tokens/s")


def test_columns_are_as_wide_as_their_widest_cell():
    assert columns([("arm", "n"), ("stepwise", "10")]) == ["arm       n", "stepwise  10"]


def test_a_line_says_that_nothing_has_ended(watched):
    stream = io.StringIO()
    clock = watched(stream)
    with Progress(9, "demo", "runs") as bar:
        bar.show("each run tells more in its log.txt")
        clock.now += 119
        bar.wait()
        assert stream.getvalue() == ""
        clock.now += 1
        bar.wait()
        bar.wait()
    assert stream.getvalue() == "demo: 0 of 9 runs, each run tells more in its log.txt, ? left\n"
