"""An adapter has the same bytes in every process: it is made here, and by a second Python with another store."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHECKOUT
from test_adapters import CHAINS, Chain

TESTS = Path(__file__).parent
NAMES = ("merge", "stack whole")
AGAIN = """
import json, sys
from pathlib import Path
import torch
from test_adapters import CHAINS, Chain

torch.set_num_threads(1)  # as conftest.py does
made = {name: Chain(Path(sys.argv[1]), Path(sys.argv[2]), *CHAINS[name]) for name in sys.argv[3:]}
print(json.dumps({name: [str(model.folder) for model in chain.models[1:]] for name, chain in made.items()}))
"""


@pytest.fixture(scope="module")
def here(toy, tmp_path_factory):
    """The folders of the three steps of each chain, made by this process."""
    store = tmp_path_factory.mktemp("here")
    return {name: [model.folder for model in Chain(toy, store, *CHAINS[name]).models[1:]] for name in NAMES}


@pytest.fixture(scope="module")
def there(toy, tmp_path_factory):
    """The same folders, made by a process whose sets have another order."""
    order = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    paths = os.pathsep.join(map(str, (CHECKOUT, TESTS.parent, TESTS)))
    command = [sys.executable, "-c", AGAIN, str(toy), str(tmp_path_factory.mktemp("there")), *NAMES]
    env = os.environ | {"PYTHONHASHSEED": order, "PYTHONPATH": paths}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_has_the_same_bytes_in_every_process(here, there, name):
    assert len(here[name]) == len(there[name]) == 3
    for ours, theirs in zip(here[name], there[name], strict=True):
        files, again = _files(ours), _files(theirs)
        assert {"adapter_config.json", "adapter_model.safetensors", "lineage.json"} <= files.keys()
        assert files.keys() == again.keys()
        assert [file for file in files if files[file] != again[file]] == []


def test_target_modules_are_sorted(here):
    written = json.loads(Path(here["merge"][0], "adapter", "adapter_config.json").read_text())
    assert written["target_modules"] == sorted(written["target_modules"])


def _files(step):
    """The bytes of the adapter's files and of the merged weights, by file name."""
    paths = [*Path(step, "adapter").iterdir(), Path(step, "model.safetensors")]
    return {path.name: path.read_bytes() for path in paths}
