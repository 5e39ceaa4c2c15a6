"""The synthetic folders of runs.py have the files, keys, columns and kinds of lines of real runs."""

import json
import re

import pandas as pd
import pytest
import yaml
from runs import ARMS, make_run, make_sweep, real_sweep
from test_numbers import check_summary

from sdpo import config
from sdpo.run.folder import Run


def shape(value):
    """The keys and types of a JSON value, without numbers and texts; every hash key becomes "hash"."""
    if isinstance(value, dict):
        return {"hash" if re.fullmatch("[0-9a-f]{64}", key) else key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return sorted({json.dumps(shape(inner), sort_keys=True) for inner in value})
    return type(value).__name__


def described(path):
    """The shape of a file: of its JSON, of each of its JSON lines, or of the columns of its table."""
    if path.suffix == ".parquet":
        return dict(pd.read_parquet(path).dtypes)
    if path.suffix == ".jsonl":
        lines = map(json.loads, path.read_text().splitlines())
        return [(line.get("kind"), line.get("t"), shape(line)) for line in lines]
    return shape(yaml.safe_load(path.read_text()) if path.suffix == ".yaml" else json.loads(path.read_text()))


def files(folder):
    """Every file and link of a run by name; RUN stands for the name of the run."""
    found = [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    return {str(path.relative_to(folder)).replace(f"{folder.name}-M", "RUN-M"): path for path in found}


@pytest.mark.parametrize("num_steps", ARMS)
def test_a_run_has_what_a_real_run_has(tmp_path, num_steps):
    ours = files(make_run(tmp_path / "ours", arm="any", seed=3, num_steps=num_steps, sweep="sweep"))
    real = files(real_sweep() / str(num_steps))
    assert ours.keys() == real.keys()
    read = [name for name in real if name.endswith((".json", ".jsonl", ".parquet", ".yaml"))]
    assert {name: described(ours[name]) for name in read} == {name: described(real[name]) for name in read}
    unread = ["done", ".lock", *(f"steps/{t}" for t in range(1, num_steps + 1))]
    assert sorted([*read, *unread]) == sorted(real)


def test_a_sweep_has_what_a_real_sweep_has(tmp_path):
    ours = make_sweep(tmp_path / "ours", seeds=1)
    assert {path.suffix for path in ours.iterdir()} == {path.suffix for path in real_sweep().iterdir()} == {"", ".json"}
    assert described(ours / "sweep.json") == described(real_sweep() / "sweep.json")


def test_what_a_run_says_twice_it_says_alike(tmp_path):
    for folder in (make_run(tmp_path / "asked", seed=1), make_run(tmp_path / "unasked", seed=2, answers=False)):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        manifest, summary = (json.loads((folder / f"{name}.json").read_text()) for name in ("manifest", "summary"))
        check_summary(summary, lines)
        settings = config.load(folder / "config.yaml")
        assert Run(settings, folder, choices={}, arm="").finished
        assert settings.seed == manifest["seed"]
        steps = {line["t"]: line for line in lines if line["kind"] == "step"}
        for step in manifest["steps"]:
            line = steps[step["t"]]
            assert step | {name: line[name] for name in line.keys() & step.keys()} == step
        is_asked = "generate" in settings.evaluate
        assert is_asked is (folder / "answers").is_dir() is ("generate/kl" in summary["initial"]["eval"])


def test_every_arm_and_seed_has_models_of_its_own(tmp_path):
    sweep = make_sweep(tmp_path / "sweep", arms=("all at once", "a", "b"), gains=(0.0, 0.0, 0.0), seeds=2)
    steps = [step for path in sweep.glob("*/manifest.json") for step in json.loads(path.read_text())["steps"]]
    assert len(steps) == 2 * (1 + 2 + 2)
    assert len({step["key"] for step in steps}) == 2 * (1 + 1 + 2)  # a and b share their first step
    assert {step["start"] for step in steps if step["t"] == 2} < {step["key"] for step in steps if step["t"] == 1}
