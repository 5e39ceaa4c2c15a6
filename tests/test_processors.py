"""The numeric tests once more under the rounding of other processors, which PyTorch, MKL and oneDNN can imitate."""

import os
import subprocess
import sys

import pytest
from conftest import CHECKOUT

OTHERS = {
    "no vector instructions": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2"},
    "AVX2 everywhere": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}
NUMERIC = ["test_equivalence.py", "test_pins.py", "test_tabular.py", "test_pitfalls.py", "test_faults.py"]
NUMERIC += [f"model/test_{name}.py" for name in ("logprobs", "attention", "packing", "adapters")]
NUMERIC += ["variants", "train", "curriculum"]
SAY_WHICH = "import torch; print(torch.backends.cpu.get_cpu_capability().lower())"


def run(environment, *arguments):
    return subprocess.run(
        [sys.executable, *arguments], cwd=CHECKOUT, env=os.environ | environment, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("processor", OTHERS)
def test_the_numeric_tests_hold(processor):
    environment = OTHERS[processor]
    found = run(environment, "-c", SAY_WHICH).stdout.strip()
    if found != environment["ATEN_CPU_CAPABILITY"]:
        pytest.skip(f"this processor cannot be used as {environment['ATEN_CPU_CAPABILITY']}, only as {found}")
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *(f"tests/{name}" for name in NUMERIC)]
    ended = run(environment, *command)
    assert ended.returncode == 0, ended.stdout[-5000:]
