"""Imports the package alpaca_eval, without what its import changes elsewhere."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import distribution
from importlib.util import find_spec
from types import ModuleType

from sdpo.errors import UserError, one_line

NO_SECRETS = "PYTHON_DOTENV_DISABLED"  # no keys from a file .env above the folder of the package


@cache
def alpaca_eval() -> ModuleType:
    """The package. Raises UserError if it is not installed or cannot be imported."""
    if find_spec("alpaca_eval") is None:
        raise UserError("evaluate.judge.protocol=alpaca_eval needs the package alpaca_eval: pip install '.[judge]'")
    try:
        with _contained():
            import alpaca_eval.annotators
    except ImportError as error:
        raise UserError(
            f"the package alpaca_eval cannot be imported ({one_line(error)}): pip install '.[judge]' has the "
            "versions that work"
        ) from error
    return alpaca_eval


@contextmanager
def _contained() -> Iterator[None]:
    """Import alpaca_eval in here: the log's level and NO_SECRETS are restored behind it.

    It stands in for `pkg_resources`, which setuptools 82 removed and alpaca_eval 0.6.6 asks for versions alone.
    """
    level, before = logging.getLogger().level, os.environ.get(NO_SECRETS)
    missing = find_spec("pkg_resources") is None
    os.environ[NO_SECRETS] = "1"
    if missing:
        stand_in = ModuleType("pkg_resources")
        stand_in.get_distribution = distribution  # type: ignore[attr-defined]
        sys.modules["pkg_resources"] = stand_in
    try:
        yield
    finally:
        logging.getLogger().setLevel(level)
        if missing:
            del sys.modules["pkg_resources"]
        if before is None:
            del os.environ[NO_SECRETS]
        else:
            os.environ[NO_SECRETS] = before
