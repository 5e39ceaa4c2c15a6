"""The plan of the code: imports go one way, read from the source with those inside functions; and no folder is full."""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import CHECKOUT

# A file or folder of sdpo/ may import what stands in its own line or in a line above it.
ORDER = [
    "errors types fields config binding distributed console store metrics stats wandb_mirror",
    "variants",
    "data",
    "model",
    "lab",
    "train",
    "evals",
    "curriculum",
    "validate",
    "run stepwise export",
    "plan",
    "launch",
]
LEVEL = {part: level for level, line in enumerate(ORDER) for part in line.split()}
NOTHING_ELSE = {  # all that a package may import of sdpo
    "sdpo.variants": ["sdpo.types", "sdpo.errors"],
    "analysis": ["sdpo.stats", "sdpo.metrics", "sdpo.errors"],
}
ONLY_IN = {"wandb": ["sdpo.wandb_mirror", "analysis.from_wandb"], "deepspeed": ["sdpo.model.zero"]}
UNSEEN = ["importlib", "importlib.import_module"]  # import what no reader of the source finds
ABOVE = ["analysis", "hydra_plugins", "tests", "train"]  # what imports sdpo

FORBIDDEN = [
    ("sdpo.store.artifacts", "import sdpo.data.readers"),
    ("sdpo.data.readers", "from sdpo.train import step"),
    ("sdpo.validate", "from sdpo.run.folder import Run"),
    ("sdpo.run.folder", "from sdpo.plan import report as plan"),
    ("sdpo.variants.loss", "from sdpo.config import Config"),
    ("sdpo.variants.loss", "from sdpo.variants import score"),
    ("sdpo.launch.sweep", "from analysis.report import write_report"),
    ("sdpo.launch.sweep", "import wandb"),
    ("sdpo.model.engine", "from deepspeed.utils import safe_get_full_grad"),
    ("sdpo.data.readers", "from . import schemas"),
    ("sdpo.binding", "from importlib import import_module"),
    ("analysis.report", "from sdpo.run import folder"),
    ("analysis.report", "from wandb import proto"),
]
ALLOWED = [
    ("sdpo.launch.sweep", "from sdpo.run import folder"),
    ("sdpo.stepwise", "from sdpo.run.results import write"),
    ("sdpo.variants.loss", "from sdpo.types import Window"),
    ("sdpo.variants.loss", "import torch.nn.functional as F"),
    ("sdpo.model.zero", "from deepspeed import comm"),
    ("analysis.report", "from sdpo import stats"),
    ("analysis.report", "from analysis import figures"),
    ("analysis.from_wandb", "import wandb"),
    ("analysis.benchmark.work", "from sdpo.train import step"),
]
PLACES = {"at the top": "{}", "in a function": "def later():\n    {}", "in a branch": "if True:\n    {}"}


def sources():
    """{module: source} of sdpo/ and analysis/."""
    files = [file for package in ("sdpo", "analysis") for file in (CHECKOUT / package).rglob("*.py")]
    return {".".join(file.relative_to(CHECKOUT).with_suffix("").parts): file.read_text() for file in files}


def imported(source):
    """The dotted names that a source imports, wherever the import stands; a relative one begins with a dot."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def inside(name, packages):
    """The first of some packages that a name is, or is part of."""
    return next((package for package in packages if f"{name}.".startswith(f"{package}.")), None)


def is_forbidden(module, name):
    if name.startswith(".") or name in UNSEEN:
        return True
    if limited := inside(name, ONLY_IN):
        return module not in ONLY_IN[limited]
    if inside(name, ABOVE):
        return not inside(module, ["analysis"])
    if not inside(name, ["sdpo"]) or inside(module, ["analysis.benchmark"]):
        return False
    if closed := inside(module, NOTHING_ELSE):
        return not inside(name, NOTHING_ELSE[closed])
    return LEVEL[name.split(".")[1]] > LEVEL[module.split(".")[1]]


def violations(modules):
    """The forbidden imports of {module: source}, and the first cycle among these modules."""
    names = {module: list(imported(source)) for module, source in modules.items()}
    found = [f"{module} imports {name}" for module in names for name in names[module] if is_forbidden(module, name)]
    graph = {
        module: {name if name in modules else name.rpartition(".")[0] for name in names[module]} & modules.keys()
        for module in modules
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as cycle:
        found.append(" <- ".join(cycle.args[1]))
    return found


def test_every_import_goes_the_way_that_is_drawn():
    modules = sources()
    assert len(modules) > 90 and violations(modules) == []
    assert {module.split(".")[1] for module in modules if inside(module, ["sdpo"])} - {"__init__"} == LEVEL.keys()


@pytest.mark.parametrize("place", PLACES)
def test_a_planted_import_is_found_wherever_it_stands(place):
    for module, line in FORBIDDEN:
        assert len(violations({module: PLACES[place].format(line)})) == 1, (module, line)
    for module, line in ALLOWED:
        assert violations({module: PLACES[place].format(line)}) == [], (module, line)


@pytest.mark.parametrize("place", PLACES)
def test_a_planted_cycle_is_found_wherever_it_stands(place):
    there = {"sdpo.metrics": "from sdpo.config import Config", "sdpo.config": "from sdpo.errors import UserError"}
    assert violations(there) == []
    back = there | {"sdpo.config": PLACES[place].format("from sdpo import metrics")}
    (cycle,) = violations(back)
    assert set(cycle.split(" <- ")) == there.keys()


def test_packages_are_empty_files():
    assert [module for module, text in sources().items() if module.endswith("__init__") and text] == []


def test_no_folder_is_full_and_no_file_is_long():
    folders = {path.parent for path in (CHECKOUT / "sdpo").rglob("*.py")}
    counts = {folder.name: len(list(folder.glob("*.py"))) - 1 for folder in folders}  # without __init__.py
    assert {name: count for name, count in counts.items() if count > 13} == {} != counts
    groups = {path.parent for path in (CHECKOUT / "conf").rglob("*.yaml")}
    lists = {"loss", "model", "score", "published"}
    assert {group.name for group in groups if len(list(group.glob("*.yaml"))) > 20} <= lists
    packages = ("sdpo", "analysis", "hydra_plugins", "tests")
    files = [CHECKOUT / "train.py", *(file for package in packages for file in (CHECKOUT / package).rglob("*.py"))]
    lines = {file.name: len(file.read_text().splitlines()) for file in files}
    assert {name: count for name, count in lines.items() if count > 300} == {} != lines
