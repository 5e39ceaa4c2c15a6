"""The environment of a run: library versions, state of the code, machine. Names no user, host or folder."""

import hashlib
import os
import platform
import shutil
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "deepspeed", "peft")
CHECKOUT = Path(__file__).parents[2]


def environment() -> dict[str, dict]:
    """The entries `versions`, `git` and `machine` of manifest.json; null for what is absent."""
    return {"versions": _versions(), "git": _git(), "machine": _machine()}


def _versions() -> dict[str, str | None]:
    project = CHECKOUT / "pyproject.toml"  # absent if the package is installed
    own = tomllib.loads(project.read_text())["project"]["version"] if project.is_file() else version("sdpo")
    versions: dict[str, str | None] = {"sdpo": own, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            versions[library] = None
    return versions


def _git() -> dict[str, str | bool | None]:
    """The commit, whether the checkout differs from it, and a hash of the diff of the tracked files."""

    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", "-C", CHECKOUT, *arguments], check=True, capture_output=True).stdout

    unknown: dict[str, str | bool | None] = {"commit": None, "dirty": None, "diff": None}
    if not (CHECKOUT / ".git").exists() or not shutil.which("git"):
        return unknown
    try:
        commit, diff = git("rev-parse", "HEAD").decode().strip(), git("diff", "--binary", "HEAD")
        is_dirty = bool(git("status", "--porcelain"))
    except subprocess.CalledProcessError:  # nothing is committed, or another user owns the checkout
        return unknown
    return {"commit": commit, "dirty": is_dirty, "diff": hashlib.sha256(diff).hexdigest() if diff else None}


def _machine() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": num_cores(),
        "gpus": query_gpus("name"),
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def num_cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def query_gpus(field: str) -> list[str]:
    """One field of every GPU, from nvidia-smi: torch would start CUDA, and a process that did cannot fork."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True)
    return [] if answer.returncode else answer.stdout.splitlines()  # without a driver it prints a sentence
