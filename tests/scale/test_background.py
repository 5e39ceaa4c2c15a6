"""Several ranks: the next step begins while threads of all ranks still hash the last one."""

import errno
import time

import pytest
import ranks
from conftest import compose

from sdpo import distributed
from sdpo.store import publishing
from sdpo.train.loop import TrainingLoop

NUM_STEPS = 3
pytestmark = pytest.mark.slow


def hold_back():
    """In this rank no step but the last one is hashed before the next one trains; a rank that waits for it fails."""
    begun, run, settle = [], TrainingLoop.run, publishing._settle

    def begin(self, *arguments):
        begun.append(self.spec.t)
        return run(self, *arguments)

    def wait(folder):
        number, deadline = len(begun), time.monotonic() + 60
        while folder.parent.name == "step" and number == len(begun) < NUM_STEPS:
            assert time.monotonic() < deadline, f"step {number + 1} waits for step {number}"
            time.sleep(0.01)
        return settle(folder)

    TrainingLoop.run, publishing._settle = begin, wait


def fill_the_disk():
    """In rank 1 the disk is full when a thread puts step 1 on it."""
    sync = publishing._sync

    def refuse(paths):
        if distributed.rank() == 1 and any(path.parent.parent.name == "step" for path in paths):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(paths)

    publishing._sync = refuse


@pytest.fixture
def settings(toy):
    files = ",".join(str(toy / f"{source}.jsonl") for source in "abc")
    base = ["model=local", f"model.path={toy / 'model'}", "data=local", f"data.train=[{files}]", "data.template=plain"]
    base += ["launch.ranks=2", "launch.device=cpu", "launch.checkpoint_minutes=0", "evaluate=[]", "optim.lr=3e-3"]
    return lambda *overrides: compose(*base, "optim.pairs_per_update=8", *overrides)


@pytest.mark.parametrize("stage", ["off", "zero2", "zero3"])
def test_the_next_step_trains_while_the_last_one_is_hashed(settings, tmp_path, stage):
    config, found = settings(f"deepspeed={stage}"), []
    for name, before in (("plain", None), ("held_back", hold_back)):
        ranks.finish(tmp_path / name, ranks.start(config, tmp_path / name, tmp_path / f"store-{name}", before))
        steps = (tmp_path / name / "steps" / str(t) for t in range(1, NUM_STEPS + 1))
        found.append([(step / "model.safetensors").read_bytes() for step in steps])
    assert found[0] == found[1]


def test_an_error_of_one_rank_s_thread_is_the_error_of_the_run(settings, tmp_path):
    """With reference=average rank 0 alone waits for M_1: it must not wait for a thread that has failed elsewhere."""
    config, folder = settings("deepspeed=off", "reference=average", "launch.timeout_minutes=1000"), tmp_path / "run"
    processes = ranks.start(config, folder, tmp_path / "store", fill_the_disk)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [1, 1]
    assert "No space left on device" in (folder / "error.txt").read_text()
    assert not [*(tmp_path / "store").glob("step/*")]
