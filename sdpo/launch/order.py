"""What is known of a sweep's runs before they start: the order in which they should, and what each needs."""

import multiprocessing
import signal
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from sdpo.errors import UserError
from sdpo.launch import placement
from sdpo.launch.placement import Need
from sdpo.run.folder import Run


class Turn(NamedTuple):
    """A run that waits to start, and what it needs of its place."""

    run: Run
    need: Need


def by_first_missing_step(todo: list[Run]) -> list[Turn]:
    """Return the runs so that one run for each first missing step comes first, then a second one for each, and so on.

    A run that starts beside another one which trains the same step would only wait for it. The plan is made in a forked
    process, because it starts threads. If a run cannot be planned, the order stays, each needs a place alone, and the
    run itself reports why.
    """
    import sdpo.plan.report  # noqa: F401  imported here, before the fork: this process needs torch later, too

    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, fork, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        planned = pool.submit(_plan, todo).result()
    if not planned:
        return [Turn(run, Need(alone=True)) for run in todo]
    num_earlier, turns = Counter[str](), []
    for key, _ in planned:
        turns.append(num_earlier[key])
        num_earlier[key] += 1
    return [Turn(todo[i], planned[i][1]) for i in sorted(range(len(todo)), key=turns.__getitem__)]


def _plan(todo: list[Run]) -> list[tuple[str, Need]]:
    """For each run the key of the first step that it must train, "" if it has all, and its need; empty if not known."""
    from sdpo.plan import report

    try:
        foreseen = report.foresee(todo)
    except UserError:
        return []
    steps = [[*one.initial, *one.for_scores, *one.steps] for one in foreseen]
    missing = [next((step.model.key for step in some if not step.model.reused), "") for some in steps]
    return [(key, placement.need(one.run.config, one.size)) for key, one in zip(missing, foreseen, strict=True)]
