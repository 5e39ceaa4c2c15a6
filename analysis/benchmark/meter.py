"""CPU seconds, wall seconds and peak memory of the phases of a process."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class Meter:
    """Seconds of named phases, and the peak of memory above what it was when the meter was made."""

    def __init__(self, device: str):
        self.cuda, self.phases = device == "cuda", {}
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory starts again from here
        self.start = self._peak()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        cpu, wall = time.process_time(), time.monotonic()
        yield
        if self.cuda:
            torch.cuda.synchronize()
        spent = self.phases.setdefault(name, {"cpu": 0.0, "wall": 0.0})
        spent["cpu"] += time.process_time() - cpu
        spent["wall"] += time.monotonic() - wall

    def around(self, name: str, function: Callable) -> Callable:
        """The function, with its calls counted as a phase."""

        def measured(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return measured

    def result(self) -> dict:
        return {"phases": self.phases, "peak_bytes": self._peak() - self.start}

    def _peak(self) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
