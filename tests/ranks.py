"""The ranks of a run without torchrun, which are forked and therefore start at once.

A rank does what it does under torchrun (sdpo/launch/rank.py), except that it does not watch a parent.
"""

import socket
from contextlib import ExitStack
from functools import partial

import forked

from sdpo import config as configuration
from sdpo.launch import rank
from sdpo.run.folder import Run


def start(settings, folder, store, before=None):
    """Start the ranks of one run; `before()` is called in each of them first. Returns their processes."""
    Run(settings, folder, choices={}, arm="").prepare()
    world = {"WORLD_SIZE": str(settings.launch.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    world["SDPO_STORE"] = str(store)
    execute, processes = partial(_execute, folder, before), []
    for number in range(settings.launch.ranks):
        its_own = world | {"RANK": str(number), "LOCAL_RANK": str(number)}
        processes.append(forked.start(execute, its_own, folder / f"rank-{number}.txt", daemon=True))
    return processes


def finish(folder, processes):
    """Wait until the ranks of a run end; AssertionError with what they wrote if one failed."""
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    assert not any(codes), "\n".join(path.read_text() for path in sorted(folder.glob("rank-*.txt")))


def _execute(folder, before):
    if before:
        before()
    rank.exit_at_signals(even_if_ignored=True)
    rank.execute(configuration.load(folder / "config.yaml"), folder)


_given = set()


def _free_port():
    """A port that is free, and that no earlier call returned: runs that start together need several."""
    with ExitStack() as opened:
        while True:
            server = opened.enter_context(socket.create_server(("127.0.0.1", 0)))
            port = str(server.getsockname()[1])
            if port not in _given:
                _given.add(port)
                return port
