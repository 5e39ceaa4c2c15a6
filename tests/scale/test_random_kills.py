"""Parent, agent or rank are killed at random moments of runs of three steps; each run goes on to the same bytes.

The environment variable KILLS sets the number of kills (10).
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import ranks
import torch
from conftest import CHECKOUT, compose
from processes import alive, children

from sdpo.model.engine import has_bf16
from sdpo.run.folder import Run

KILLS = int(os.environ.get("KILLS", 10))
STAGES = ("off", "zero2", "zero3")
VICTIMS = ("parent", "agent", "rank 0", "rank 1")
SHARES = {stage: len(range(i, KILLS, len(STAGES))) for i, stage in enumerate(STAGES)}
MOMENTS = {  # of a kill: the files of the store that must have appeared; a checkpoint and a step are first named tmp-*
    "in an update": "partial/*/[0-9]*/manifest.json",
    "in a checkpoint": "partial/*/tmp-*/*",
    "while it saves": "step/tmp-*/*",
    "while it hashes": "step/tmp-*/train.json",
    "as a step ends": "step/[0-9a-f]*/manifest.json",
}
AT_START = "as it starts"


class Killed:
    """A run of three steps and its store, which is started and killed again and again."""

    def __init__(self, settings, place):
        self.settings, self.folder, self.store = settings, place / "run", place / "store"
        self.config = str(self.folder / "config.yaml")

    def start(self):
        Run(self.settings, self.folder, choices={}, arm="").prepare()
        environment = os.environ | {"SDPO_STORE": str(self.store)}
        command = [sys.executable, "-m", "sdpo.launch", self.config]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, env=environment, cwd=CHECKOUT, **pipes)

    def found(self, moment):
        """The files that tell a moment."""
        while True:
            with suppress(FileNotFoundError):  # a folder was renamed while it was listed
                return set(self.store.glob(MOMENTS[moment])) if moment in MOMENTS else set()

    def kill(self, rng):
        """Start the run and kill a part of it at a random moment. Returns both, or None if the run ended before."""
        moment, victim = rng.choice([AT_START, *MOMENTS]), rng.choice(VICTIMS)
        delay = rng.uniform(0, 8 if moment == AT_START else 0.03)
        before, parent = self.found(moment), self.start()
        while moment != AT_START and self.found(moment) <= before and parent.poll() is None:
            time.sleep(0.002)
        time.sleep(delay)
        target = self.process(parent.pid, victim)
        if parent.poll() is None and target:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(target, signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 60
        while left := self.processes():
            assert time.monotonic() < deadline, f"{victim} was killed {moment}, and {left} live on"
            time.sleep(0.05)
        return (moment, victim) if parent.returncode and target else None

    def process(self, parent, victim):
        """The id of a part of a running run; None if it has not started yet or is gone."""
        try:
            (agent,) = children(parent)
            parts = [parent, agent, *children(agent)]
        except (FileNotFoundError, ProcessLookupError, ValueError):
            parts = [parent]
        part = VICTIMS.index(victim)
        return parts[part] if part < len(parts) else None

    def processes(self):
        """The processes of this run that live."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if alive(pid) and self.owns(pid)]

    def owns(self, pid):
        try:
            return self.config.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):  # it ends at this moment
            return False

    def trained(self):
        """For every step the log entries of the updates that are in its artifact, or in its newest checkpoint.

        An entry has the seconds that its update took, so a repeated update has another entry.
        """
        kept = {}
        for manifest in sorted(self.store.glob("partial/*/[0-9]*/manifest.json")):
            kept[manifest.parts[-3]] = json.loads((manifest.parent / "log.json").read_text())["entries"]
        for manifest in self.store.glob("step/[0-9a-f]*/manifest.json"):
            kept[manifest.parent.name] = json.loads((manifest.parent / "train.json").read_text())["entries"]
        return kept

    def check_nothing_is_lost(self, before):
        """No update that was kept is trained again.

        At most two that were logged are not kept: while the one before is hashed, the next one is trained and written.
        """
        now = self.trained()
        assert {key: now[key][: len(entries)] for key, entries in before.items()} == before
        log = self.folder / "metrics.jsonl"
        logged = log.read_text().count('"kind": "train"') if log.exists() else 0
        assert logged <= sum(map(len, now.values())) + 2

    def check_end(self, expected):
        """The run ended with the expected models, and its store is whole and holds nothing unfinished."""
        assert models(self.folder) == expected
        environment = os.environ | {"SDPO_STORE": str(self.store)}
        subprocess.run([sys.executable, "-m", "sdpo.store", "verify"], env=environment, cwd=CHECKOUT, check=True)
        assert [*self.store.glob("*/tmp-*"), *self.store.glob("partial/*")] == []


def models(folder):
    return [(folder / "steps" / str(t) / "model.safetensors").read_bytes() for t in (1, 2, 3)]


@pytest.fixture(scope="module")
def settings(toy):
    """settings(stage): two ranks, three steps of six updates whose reference moves, a checkpoint after every update."""
    precision = "bf16" if has_bf16(torch.device("cpu")) else "fp32"
    files = ",".join(str(toy / f"{source}.jsonl") for source in "abc")
    base = ["model=local", f"model.path={toy / 'model'}", "data=local", f"data.train=[{files}]", "data.template=plain"]
    base += ["launch.ranks=2", "launch.device=cpu", "launch.checkpoint_minutes=0", "evaluate=[]"]
    base += ["optim.lr=3e-3", "optim.pairs_per_update=8", "optim.epochs=2", "optim.moments=carry"]
    base += ["reference=mixed", "reference.updates=2", "reference.alpha=0.6", f"precision={precision}"]
    return lambda stage: compose(*base, f"deepspeed={stage}")


@pytest.fixture(scope="module")
def count():
    """How often each part was killed at each moment, which is printed at the end."""
    counted = Counter()
    yield counted
    moments = [AT_START, *MOMENTS]
    print(f"\n{counted.total()} kills\n{'':17}" + "".join(f"{victim:>8}" for victim in VICTIMS))
    for moment in moments:
        print(f"{moment:17}" + "".join(f"{counted[moment, victim]:8}" for victim in VICTIMS))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_runs_killed_at_random_end_in_the_bytes_of_one_that_was_not(settings, count, tmp_path, stage):
    whole = tmp_path / "whole"
    ranks.finish(whole, ranks.start(settings(stage), whole, tmp_path / "whole-store"))
    expected, rng = models(whole), random.Random(stage)
    run, num_runs, left = Killed(settings(stage), tmp_path / "0"), 1, SHARES[stage]
    while left:
        before = run.trained()
        if struck := run.kill(rng):
            count[struck] += 1
            left -= 1
            print(f"{stage}: killed {struck[0]}: {struck[1]}, {sum(map(len, run.trained().values()))} updates are kept")
        run.check_nothing_is_lost(before)
        if (run.folder / "done").exists():
            run.check_end(expected)
            run, num_runs = Killed(settings(stage), tmp_path / str(num_runs)), num_runs + 1
    before = run.trained()
    assert run.start().wait() == 0
    run.check_nothing_is_lost(before)
    run.check_end(expected)
