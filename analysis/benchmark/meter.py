"""CPU seconds, wall seconds and peak memory of the phases of a process."""

import ctypes
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sdpo.train.throughput import peak_memory


class Seconds(NamedTuple):
    """Time of a process and of a clock."""

    cpu: float
    wall: float


class Meter:
    """Seconds of the passes of named phases, and the peak memory above that in use when the meter was made.

    The first pass of a phase includes what a process does only once: allocating, choosing kernels, compiling.
    """

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.phases: dict[str, list[Seconds]] = {}
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # else what an earlier measurement freed counts as in use
            Path("/proc/self/clear_refs").write_text("5")  # on Linux this resets the peak of resident memory
        self.start = self._peak()
        self.mark()

    def mark(self) -> None:
        """Begin a pass."""
        self.began = self._now()

    def lap(self, phase: str) -> None:
        """End a pass of a phase, and begin the next one."""
        now = self._now()
        self.phases.setdefault(phase, []).append(Seconds(now.cpu - self.began.cpu, now.wall - self.began.wall))
        self.began = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A pass of a phase that may contain passes of others."""
        began = self._now()
        yield
        now = self._now()
        self.phases.setdefault(name, []).append(Seconds(now.cpu - began.cpu, now.wall - began.wall))

    def time_calls(self, phase: str, owner: Any, name: str) -> None:
        """Let every call of the function `owner.name` be a pass of a phase; a generator is exhausted in its call."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase):
                result = function(*args, **kwargs)
                return list(result) if isinstance(result, Iterator) else result

        setattr(owner, name, timed)

    def result(self) -> dict:
        """Phases with their passes as [CPU seconds, wall seconds], and bytes."""
        return {"phases": self.phases, "peak_bytes": self._peak() - self.start}

    def _now(self) -> Seconds:
        if self.cuda:
            torch.cuda.synchronize()
        return Seconds(time.process_time(), time.monotonic())

    def _peak(self) -> int:
        return peak_memory(torch.device("cuda" if self.cuda else "cpu"))
