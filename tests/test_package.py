"""The package: dependencies are declared once and pinned as tested, and a wheel holds all that the code reads."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions, version

import pytest
from conftest import CHECKOUT
from packaging.requirements import Requirement

PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OURS = {"sdpo", "analysis", "hydra_plugins", "train"}
IN_NOTEBOOKS = {"IPython"}  # imported only inside one


def requirements(lines):
    found = [Requirement(line) for line in lines if line and not line.startswith(("#", "-r"))]
    return {requirement.name: requirement for requirement in found if requirement.name != "sdpo"}


def pinned(name):
    return requirements((CHECKOUT / name).read_text().splitlines())


@pytest.mark.parametrize(
    ("file", "declared"),
    [
        ("requirements.txt", PROJECT["dependencies"] + EXTRAS["eval"]),
        ("requirements-dev.txt", EXTRAS["dev"] + EXTRAS["judge"]),
    ],
)
def test_every_range_has_one_pin_inside_it(file, declared):
    ranges, pins = requirements(declared), pinned(file)
    assert list(pins) == list(ranges)
    for name, pin in pins.items():
        (exact,) = pin.specifier
        assert exact.operator == "==" and exact.version in ranges[name].specifier and pin.marker == ranges[name].marker


def test_these_tests_run_with_the_pinned_versions():
    pins = pinned("requirements.txt") | pinned("requirements-dev.txt")
    assert {name: version(name).partition("+")[0] for name in pins} == {
        name: str(pin.specifier).removeprefix("==") for name, pin in pins.items()
    }


def test_every_library_that_the_code_imports_is_declared():
    files = [CHECKOUT / "train.py", *(file for part in OURS for file in (CHECKOUT / part).rglob("*.py"))]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    modules = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - OURS - IN_NOTEBOOKS
    extras = [line for extra in ("dev", "eval", "judge", "quant") for line in EXTRAS[extra]]
    declared = {name.lower().replace("_", "-") for name in requirements(PROJECT["dependencies"] + extras)}
    of = packages_distributions()  # without what is not installed, as the extra `quant`
    missing = {
        module
        for module in modules
        if not {name.lower().replace("_", "-") for name in of.get(module, [module])} & declared
    }
    assert "torch" in modules and missing == set()


def test_the_lock_has_every_pin_and_a_hash_of_each_file():
    entries = (CHECKOUT / "requirements.lock").read_text().replace("\\\n", "").splitlines()
    entries = [line.partition("--hash=") for line in entries if not line.lstrip().startswith("#")]
    locked = requirements([line.strip() for line, _, _ in entries])
    assert all(digest for _, _, digest in entries) and len(locked) > 2 * len(pinned("requirements.txt"))
    assert {name: locked[name].specifier for name in pinned("requirements.txt")} == {
        name: pin.specifier for name, pin in pinned("requirements.txt").items()
    }


@pytest.mark.slow
def test_a_wheel_holds_the_code_and_all_that_it_reads(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    subprocess.run([*build, CHECKOUT], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    options = {f"sdpo/conf/{path.relative_to(CHECKOUT / 'conf')}" for path in (CHECKOUT / "conf").rglob("*.yaml")}
    parts = ("analysis/data", "analysis/templates", "sdpo", "analysis", "hydra_plugins")
    read = {
        str(path.relative_to(CHECKOUT))
        for part in parts
        for path in (CHECKOUT / part).rglob("*")
        if path.suffix in (".py", ".yaml", ".jinja", ".css") and "conf" not in path.parts
    }
    assert options | read | {"train.py"} <= held
    assert {name.partition("/")[0] for name in held if ".dist-info" not in name} == OURS - {"train"} | {"train.py"}
