"""What the user is told before anything runs: the axes and their options, and what is wrong with a command.

All of it is read from conf/: a file's first comment line is its sentence, a key's comment its explanation.
"""

import re
import textwrap
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from sdpo import config, errors
from sdpo.errors import UserError

CONF = Path(__file__).parents[2] / "conf"
MOST_LINES = 4  # that the options of one axis take on the screen of all
EXAMPLES = """\
python train.py                                         stepwise DPO on the built-in laboratory
python train.py split=all_at_once reference=initial     plain DPO
python train.py -m seed=0,1,2 reference=initial,previous   a sweep
python train.py experiment=demo                         a sweep kept as a file
python train.py data=local 'data.train=[a.jsonl,b.parquet]' model=hub model.path=HuggingFaceTB/SmolLM2-135M
python train.py steps.2.optim.lr=1e-6                   another learning rate in step 2
python train.py experiment=demo plan=true               what exists, what would be trained, what it costs"""


def show(names: list[str]) -> str:
    """All axes on one screen; or the axis, or the section of config.yaml, that is named. UserError if unknown."""
    if not names:
        return _overview()
    if names[0] in groups():
        return "\n".join(_option(names[0], option) for option in options(names[0]))
    if names[0] in _sections():
        return _sections()[names[0]]
    raise UserError(f"no help on {names[0]!r}; there is help on {', '.join([*groups(), *_sections()])}")


def options(group: str) -> list[str]:
    """The options of an axis: its files."""
    return sorted(str(path.relative_to(CONF / group).with_suffix("")) for path in (CONF / group).rglob("*.yaml"))


def explain(error: Exception, arguments: list[str]) -> str:
    """One line for what a command's arguments led to: what is wrong and what exists."""
    if isinstance(error, HydraException):
        error = _cause(error, arguments)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"{group} has no {option!r}; it has {', '.join(options(group))}"
    cause = error.__cause__ if isinstance(error, HydraException) else error
    if isinstance(cause, OmegaConfBaseException) and cause.parent_node:
        return config.sentence(cause)
    return errors.one_line(error)


def groups() -> dict[str, str]:
    """The axes in the order of config.yaml's defaults, each with its default."""
    return dict(re.findall(r"^  - (\w+): (\S+)", (CONF / "config.yaml").read_text(), re.MULTILINE))


def _cause(error: HydraException, arguments: list[str]) -> HydraException:
    """What is wrong with a command. Where an experiment that is a sweep cannot be composed, Hydra takes it for a single
    run and only says that a run has no swept keys; composed with one value of each, it says why."""
    if any(argument.startswith("-") for argument in arguments):  # with --multirun Hydra knows
        return error
    try:
        overrides = [_one_value(override) for override in OverridesParser.create().parse_overrides(arguments)]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            compose("config", overrides)
    except HydraException as cause:
        return cause
    return error


def _one_value(override: Override) -> str:
    if not override.is_discrete_sweep():
        return override.input_line
    return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"


def _sections() -> dict[str, str]:
    """The other keys of config.yaml, each as the lines that stand there."""
    body = (CONF / "config.yaml").read_text().partition("\n\n")[2].partition("\nhydra:")[0]
    blocks = re.findall(r"^\w+:.*(?:\n  .*)*", body, re.MULTILINE)
    return {block.partition(":")[0]: block for block in blocks}


def _overview() -> str:
    lines = ["python train.py [axis=option ...] [key=value ...]", "", "axes, and their options (* unless you say)"]
    for group, default in groups().items():
        marked = [f"{option}*" if option == default.strip('"[]') else option for option in options(group)]
        body = textwrap.wrap(" ".join(marked) or "-", 92)
        if len(body) > MOST_LINES:
            body[MOST_LINES - 1 :] = [f"... and others: --help {group}"]
        lines += [f"  {group:<12}{body[0]}", *(f"  {'':<12}{line}" for line in body[1:])]
    lines += ["", "keys"] + [f"  {text.splitlines()[0]}" for text in _sections().values()]
    lines += [
        "",
        "examples",
        textwrap.indent(EXAMPLES, "  "),
        "",
        "python train.py --help loss    explains an axis or key",
    ]
    return "\n".join(lines)


def _option(group: str, option: str) -> str:
    """An option's sentence, and its keys with their comments."""
    lines = (CONF / group / f"{option}.yaml").read_text().splitlines()
    comments = [line.lstrip("# ") for line in lines if line.startswith("#") and "@package" not in line]
    keys = [f"    {line}" for line in lines if line and not line.startswith(("#", "name:", "defaults:", "  - "))]
    return "\n".join([f"{option:<16} {comments[0]}", *keys])
