"""The text of --help, and one line for what is wrong with a command.

Both are read from conf/: the first comment line of a file describes an option, the comment of a key explains the key.
"""

import re
import textwrap
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from sdpo import errors, fields
from sdpo.errors import UserError

CONF = Path(__file__).parents[1] / "conf"  # a link to conf/, so that an installed package carries it
MOST_LINES = 4  # for the options of one axis in the overview
EXAMPLES = """\
examples
  python train.py                                         stepwise DPO on the built-in laboratory
  python train.py split=all_at_once reference=initial     plain DPO
  python train.py -m seed=0,1,2 reference=initial,previous   a sweep
  python train.py experiment=demo                         a sweep from a file
  python train.py data=local 'data.train=[a.jsonl,b.parquet]' model=hub model.path=HuggingFaceTB/SmolLM2-135M
  python train.py steps.2.optim.lr=1e-6                   another learning rate in step 2
  python train.py experiment=demo plan=true               the steps that exist, those to train, and their cost

python train.py --help loss    explains an axis or key; --help arm=NAME its file; --help launcher sweeps"""


def show(names: list[str]) -> str:
    """All axes on one screen; or one axis, option (arm=...), section of config.yaml, or the launcher of sweeps.

    Raises UserError if the name is unknown.
    """
    if not names:
        return _overview()
    if names[0] == "markdown":
        return markdown()
    group, _, option = names[0].partition("=")
    if option and group in groups() and option in options(group):
        return (CONF / group / f"{option}.yaml").read_text().rstrip()
    if names[0] in groups():
        return "\n".join(_option(names[0], option) for option in options(names[0]))
    if names[0] in _sections():
        return _sections()[names[0]]
    if names[0] in ("launcher", "hydra.launcher"):
        return (CONF / "hydra" / "launcher" / "arms.yaml").read_text().rstrip()
    raise UserError(
        f"there is no help on {names[0]!r}; there is help on {', '.join([*groups(), *_sections(), 'launcher'])}"
    )


def markdown() -> str:
    """All axes, their options and the keys of config.yaml as Markdown: the content of docs/options.md."""
    parts = [
        "# All axes and options",
        "Made by `python train.py --help markdown`; the option in bold is the default.",
    ]
    for group, default in groups().items():
        rows = [(option, _option(group, option).splitlines()[0][len(option) :].strip()) for option in options(group)]
        marked = [(f"**{o}**" if o == default.strip('"[]') else o, said.replace("|", "\\|")) for o, said in rows]
        table = "\n".join(["| option | |", "|---|---|", *(f"| {option} | {said} |" for option, said in marked)])
        parts += [f"## {group}", table]
    sections = "\n".join(_sections().values())
    return "\n\n".join([*parts, "## Keys of config.yaml", f"```yaml\n{sections}\n```"])


def options(group: str) -> list[str]:
    """The options of an axis: the YAML files in its folder."""
    return sorted(str(path.relative_to(CONF / group).with_suffix("")) for path in (CONF / group).rglob("*.yaml"))


def explain(error: Exception, arguments: list[str]) -> str:
    """One line for an error in a command: what is wrong with its arguments, and what exists instead."""
    if isinstance(error, OverrideParseException) and not error.override.isascii():
        quoted = re.sub(r"""[^][,='"\s]*[^\x00-\x7f][^][,='"\s]*""", r'"\g<0>"', error.override)
        return f"{error.override} has letters outside ASCII, which Hydra reads in quotes only: write '{quoted}'"
    if isinstance(error, HydraException):
        error = _cause(error, arguments)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"{group} has no {option!r}; it has {', '.join(options(group))}"
    cause = error.__cause__ if isinstance(error, HydraException) else error
    if isinstance(cause, OmegaConfBaseException) and cause.parent_node:
        return fields.sentence(cause)
    return errors.one_line(error)


def groups() -> dict[str, str]:
    """The axes and their default options, in the order of config.yaml."""
    return dict(re.findall(r"^  - (\w+): (\S+)", (CONF / "config.yaml").read_text(), re.MULTILINE))


def _cause(error: HydraException, arguments: list[str]) -> HydraException:
    """The error that explains why a command cannot be composed.

    If an experiment is a sweep, Hydra takes the command for a single run and only reports that a run has no swept keys.
    Composing the command again with one value of each swept key gives the real error.
    """
    if any(argument.startswith("-") for argument in arguments):  # with --multirun Hydra reports the real error
        return error
    try:
        overrides = [_one_value(override) for override in OverridesParser.create().parse_overrides(arguments)]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            compose("config", overrides)
    except HydraException as cause:
        return cause
    return error


def _one_value(override: Override) -> str:
    """The override, with the first of its values if it sweeps over several."""
    if not override.is_discrete_sweep():
        assert override.input_line  # the parser sets it
        return override.input_line
    return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"


def _sections() -> dict[str, str]:
    """The other sections of config.yaml, by name; each as its lines in the file."""
    body = (CONF / "config.yaml").read_text().partition("\n\n")[2].partition("\nhydra:")[0]
    blocks = re.findall(r"^\w+:.*(?:\n  .*)*", body, re.MULTILINE)
    return {block.partition(":")[0]: block for block in blocks}


def _overview() -> str:
    lines = ["python train.py [axis=option ...] [key=value ...]", "", "axes and their options (*: the default)"]
    for group, default in groups().items():
        marked = [f"{option}*" if option == default.strip('"[]') else option for option in options(group)]
        body = textwrap.wrap(" ".join(marked) or "-", 92)
        if len(body) > MOST_LINES:
            body[MOST_LINES - 1 :] = [f"... and others, see --help {group}"]
        lines += [f"  {group:<12}{body[0]}", *(f"  {'':<12}{line}" for line in body[1:])]
    lines += ["", "keys"] + [f"  {text.splitlines()[0]}" for text in _sections().values()]
    return "\n".join([*lines, "", EXAMPLES])


def _option(group: str, option: str) -> str:
    """The description of an option, then its keys with their comments; the files of arms and experiments are long."""
    lines = (CONF / group / f"{option}.yaml").read_text().splitlines()
    comments = [line.lstrip("# ") for line in lines if line.startswith("#") and "@package" not in line]
    if group in ("arm", "experiment"):
        lines = []
    keys = [f"    {line}" for line in lines if line and not line.startswith(("#", "name:", "defaults:", "  - "))]
    return "\n".join([f"{option:<16} {comments[0]}", *keys])
