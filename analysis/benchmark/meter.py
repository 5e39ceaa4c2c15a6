"""CPU seconds, wall seconds and peak memory of the phases of a process."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sdpo.train.throughput import peak_memory


class Meter:
    """Seconds of named phases, and the peak memory above the memory in use when the meter was made."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.phases: dict[str, dict[str, float]] = {}
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # on Linux this resets the peak of resident memory
        self.start = self._peak()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent in this context to a phase."""
        cpu, wall = time.process_time(), time.monotonic()
        yield
        if self.cuda:
            torch.cuda.synchronize()
        spent = self.phases.setdefault(name, {"cpu": 0.0, "wall": 0.0})
        spent["cpu"] += time.process_time() - cpu
        spent["wall"] += time.monotonic() - wall

    def time_calls(self, phase: str, owner: Any, name: str) -> None:
        """Add the time of every call of the function `owner.name` to a phase; a generator is exhausted in its call."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase):
                result = function(*args, **kwargs)
                return list(result) if isinstance(result, Iterator) else result

        setattr(owner, name, timed)

    def result(self) -> dict:
        return {"phases": self.phases, "peak_bytes": self._peak() - self.start}

    def _peak(self) -> int:
        return peak_memory(torch.device("cuda" if self.cuda else "cpu"))
