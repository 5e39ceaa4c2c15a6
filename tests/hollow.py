"""A stand-in for a GPU, which computes nothing (hollow_gpu.c): what a card of a kind and size would allocate and build.

It shows peak memory to the byte that PyTorch's allocator counts, errors of memory, and whether kernels can be built. It
shows no number that a kernel computes, and no time. It needs PyTorch's CUDA build and gcc, and no card.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import CHECKOUT

PACKAGES = Path(torch.__file__).parents[1]
INCLUDE = [PACKAGES / "nvidia" / "cu13" / "include", PACKAGES / "triton" / "backends" / "nvidia" / "include"]


class Card(NamedTuple):
    """A kind of GPU: compute capability times ten, bytes of shared memory of a thread block, bytes of memory."""

    capability: int
    shared: int
    memory: float


H200, A100, RTX_4090, RTX_5090 = (
    Card(90, 232_448, 149.4e9),  # less what CUDA itself takes
    Card(80, 166_912, 84.0e9),
    Card(89, 101_376, 25.0e9),
    Card(120, 101_376, 33.0e9),
)

needs_cuda_build = pytest.mark.skipif(
    not (torch.version.cuda or "").startswith("13.") or not shutil.which("gcc") or not INCLUDE[1].is_dir(),
    reason="a hollow GPU needs PyTorch's build for CUDA 13, and gcc",
)


def build(folder: Path) -> Path:
    """Compile the stand-in; returns its folder."""
    folder.mkdir(exist_ok=True)
    command = ["gcc", "-shared", "-fPIC", "-O1", "-w", *(f"-I{path}" for path in INCLUDE), "-Wl,-soname,libcuda.so.1"]
    source = Path(__file__).with_name("hollow_gpu.c")
    subprocess.run([*command, "-o", str(folder / "libcuda.so.1"), str(source), "-lpthread"], check=True)
    nvml = folder / "libnvidia-ml.so.1"
    nvml.unlink(missing_ok=True)
    nvml.symlink_to("libcuda.so.1")
    return folder


def run_on(card: Card, folder: Path, code: str, *arguments: str) -> str:
    """What a program prints that runs on this card; `folder` has the stand-in."""
    env = os.environ | {"LD_PRELOAD": str(folder / "libcuda.so.1"), "TRITON_LIBCUDA_PATH": str(folder)}
    before = os.environ.get("LD_LIBRARY_PATH")
    env["LD_LIBRARY_PATH"] = f"{folder}:{before}" if before else str(folder)
    env |= {"HOLLOW_CAPABILITY": str(card.capability), "HOLLOW_SHARED": str(card.shared)}
    env |= {"HOLLOW_MEMORY": str(card.memory), "TRITON_CACHE_DIR": str(folder / "triton")}
    # Built kernels are not kept, because those of one card would be taken for another's.
    env |= {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    env |= {"PYTHONPATH": os.pathsep.join([str(CHECKOUT), *sys.path])}
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    done = subprocess.run(command, env=env, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
