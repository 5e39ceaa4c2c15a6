"""What a run ran on: versions, state of the code, and machine, without names of users, hosts or folders."""

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
    """The `versions`, `git` and `machine` of manifest.json; null where something is absent."""
    return {"versions": _versions(), "git": _git(), "machine": _machine()}


def _versions() -> dict[str, str | None]:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    versions: dict[str, str | None] = {"sdpo": project["version"], "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            versions[library] = None
    return versions


def _git() -> dict[str, str | bool | None]:
    """The commit, whether anything differs from it, and a hash of how the tracked files differ."""
    if not (CHECKOUT / ".git").exists() or not shutil.which("git"):
        return {"commit": None, "dirty": None, "diff": None}

    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", "-C", CHECKOUT, *arguments], check=True, capture_output=True).stdout

    diff = git("diff", "--binary", "HEAD")
    return {
        "commit": git("rev-parse", "HEAD").decode().strip(),
        "dirty": bool(git("status", "--porcelain")),
        "diff": hashlib.sha256(diff).hexdigest() if diff else None,
    }


def _machine() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": _gpus(),
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _gpus() -> list[str]:
    """GPU names from the driver's own tool: torch would start CUDA in a process that has yet to fork."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
