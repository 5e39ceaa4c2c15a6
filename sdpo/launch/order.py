"""The order in which a sweep starts its runs: runs that need the same step first do not start side by side."""

import multiprocessing
import signal
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from sdpo.errors import UserError
from sdpo.run.folder import Run


def by_first_missing_step(todo: list[Run]) -> list[Run]:
    """Return the runs so that one run for each first missing step comes first, then a second one for each, and so on.

    A run that starts beside another one which trains the same step would only wait for it. The plan is made in a forked
    process, because it starts threads. If a run cannot be planned, the order stays, and the run itself reports why.
    """
    import sdpo.plan.report  # noqa: F401  imported here, before the fork: this process needs torch later, too

    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, fork, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        missing = pool.submit(_first_missing_steps, todo).result()
    num_earlier, turns = Counter[str](), []
    for key in missing:
        turns.append(num_earlier[key])
        num_earlier[key] += 1
    return [todo[i] for i in sorted(range(len(missing)), key=turns.__getitem__)] if missing else todo


def _first_missing_steps(todo: list[Run]) -> list[str]:
    """The key of the first step that each run must train, "" if it has all; no keys if a run cannot be planned."""
    from sdpo.plan import report

    try:
        foreseen = report.foresee(todo)
    except UserError:
        return []
    steps = [[*one.initial, *one.for_scores, *one.steps] for one in foreseen]
    return [next((step.model.key for step in some if not step.model.reused), "") for some in steps]
