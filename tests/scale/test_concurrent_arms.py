"""Eight arms of two ranks that start at once on one store: with locks each artifact is made once, without all end well.

Their first two steps are the same; the third is different in each, except in the last two.
"""

import errno
import fcntl
import os
from collections import Counter
from functools import partial

import pytest
import ranks
from conftest import compose

from sdpo.store import artifacts, inventory

RATES = ("1e-3", "2e-3", "3e-3", "4e-3", "5e-3", "6e-3", "7e-3", "7e-3")  # of the third step
WITH_SECONDS = ("manifest.json", "train.json")


def note_what_is_made(log, with_locks):
    """In a rank: add a line to `log` for each artifact that this rank makes, and take the locks away."""
    publish = artifacts.Store.publish

    def noted(self, final, *rest, **options):
        publish(self, final, *rest, **options)
        if os.environ["RANK"] == "0":
            with log.open("a") as file:
                file.write(f"{final.parent.name}/{final.name}\n")

    def refuse(file, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    artifacts.Store.publish = noted
    if not with_locks:
        fcntl.flock = refuse


@pytest.fixture(scope="module")
def eight_arms(toy, tmp_path_factory):
    """eight_arms(with_locks) runs them; returns how often each artifact was made, and the store."""
    files = ",".join(str(toy / f"{source}.jsonl") for source in "abc")
    base = ["model=local", f"model.path={toy / 'model'}", "data=local", f"data.train=[{files}]", "data.template=plain"]
    base += ["launch.ranks=2", "launch.device=cpu", "launch.checkpoint_minutes=0", "evaluate=[]"]
    base += ["optim.lr=3e-3", "optim.pairs_per_update=8", "reference=mixed", "reference.updates=2"]

    def run(with_locks):
        place = tmp_path_factory.mktemp("arms")
        before = partial(note_what_is_made, place / "made.txt", with_locks)
        started = []
        for arm, rate in enumerate(RATES):
            settings, folder = compose(*base, f"steps.3.optim.lr={rate}"), place / str(arm)
            started.append((folder, ranks.start(settings, folder, place / "store", before)))
        for folder, processes in started:
            ranks.finish(folder, processes)
        return Counter((place / "made.txt").read_text().split()), artifacts.Store(place / "store")

    return run


def contents(store):
    """The bytes of every stored file that has no seconds in it."""
    files = (path for entry in inventory.entries(store) for path in entry.folder.rglob("*") if path.is_file())
    return {str(path.relative_to(store.root)): path.read_bytes() for path in files if path.name not in WITH_SECONDS}


@pytest.mark.slow
def test_eight_concurrent_arms_make_every_artifact_once_and_without_locks_all_end_in_the_same_bytes(eight_arms):
    made, store = eight_arms(with_locks=True)
    assert set(made.values()) == {1}
    assert sum(name.startswith("step/") for name in made) == 2 + len(set(RATES))
    made_freely, another = eight_arms(with_locks=False)
    assert max(made_freely.values()) > 1 and made_freely.keys() == made.keys()
    assert contents(another) == contents(store)
    for one in (store, another):
        inventory.verify(one)
        assert [*one.root.glob("*/tmp-*"), *one.root.glob("partial/*")] == []
