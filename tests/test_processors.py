"""Numeric tests and the demo under the rounding of other processors, which PyTorch, MKL and oneDNN can imitate."""

import json
import os
import subprocess
import sys

import pytest
from conftest import CHECKOUT

from sdpo.stats import student

OTHERS = {
    "no vector instructions": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2"},
    "AVX2 everywhere": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}
NUMERIC = ["test_equivalence.py", "test_pins.py", "test_tabular.py", "test_pitfalls.py"]
NUMERIC += [f"model/test_{name}.py" for name in ("logprobs", "attention", "packing", "rotary", "states", "adapters")]
NUMERIC += ["variants", "train", "curriculum", "lab", "test_export.py"]
PYTEST = "-m pytest -p no:cacheprovider --numprocesses logical --maxprocesses 8 --dist loadfile".split()
SAY_WHICH = "import torch; print(torch.backends.cpu.get_cpu_capability().lower())"


def run(environment, *arguments):
    return subprocess.run(
        [sys.executable, *arguments], cwd=CHECKOUT, env=os.environ | environment, capture_output=True, text=True
    )


def settings_of(processor):
    """The environment that imitates a processor; skips if this one cannot, or if another setting is the same here."""
    environment = OTHERS[processor]
    found, plain = (run(given, "-c", SAY_WHICH).stdout.strip() for given in (environment, {}))
    if found != environment["ATEN_CPU_CAPABILITY"]:
        pytest.skip(f"this processor cannot be used as {environment['ATEN_CPU_CAPABILITY']}, only as {found}")
    if "ONEDNN_MAX_CPU_ISA" in environment and plain == "avx2":
        pytest.skip("this processor has nothing above AVX2, so this setting is the one called AVX2")
    return environment


@pytest.mark.slow
@pytest.mark.parametrize("processor", OTHERS)
def test_the_numeric_tests_hold(processor):
    environment = settings_of(processor)
    ended = run(environment, *PYTEST, "-m", "not slow", *(f"tests/{name}" for name in NUMERIC))
    assert ended.returncode == 0, ended.stdout[-5000:]


def demo(environment, folder):
    """Run the demo; its last models' measures by arm and name, one value per seed, and each arm's least leverage."""
    environment = environment | {"SDPO_STORE": str(folder / "store")}
    ended = run(environment, "train.py", "experiment=demo", f"hydra.sweep.dir={folder / 'demo'}")
    assert ended.returncode == 0, ended.stderr[-5000:]
    values, leverage = {}, {}
    for file in folder.glob("demo/*/summary.json"):
        arm = json.loads((file.parent / "manifest.json").read_text())["arm"]
        steps = json.loads(file.read_text())["steps"]
        for name in ("lab/gold", "lab/kl"):
            values.setdefault((arm, name), []).append(steps[-1]["eval"][name]["value"])
        leverage.setdefault(arm, []).extend(step["reference_leverage"] for step in steps[1:])
    return values, leverage


@pytest.mark.slow
def test_the_demo_says_the_same_on_two_processors(tmp_path):
    """No seed leaves S, stepwise DPO's references are not inert, and DPO is below the best arm; no arm is exempt."""
    found = []
    for processor in ("no vector instructions", "AVX2"):
        values, leverage = demo(settings_of(processor), tmp_path / processor)
        found.append({key: student(seeds) for key, seeds in values.items()})
        assert max(kl for (_, name), seeds in values.items() if name == "lab/kl" for kl in seeds) < 5
        assert sum(leverage["easy_to_hard"]) / len(leverage["easy_to_hard"]) >= 0.02
        gold = {arm: interval.value for (arm, name), interval in found[-1].items() if name == "lab/gold"}
        assert len(gold) == 3 and max(gold.values()) - gold["all_at_once"] >= 0.02
    for key, one in found[0].items():
        other = found[1][key]
        assert one.low <= other.high and other.low <= one.high, (key, one, other)
