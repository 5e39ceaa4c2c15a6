"""Errors that the program tells apart. A `UserError` is shown as one line; any other error keeps its traceback."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

# Conditions of a disk that the user can mend, and how.
REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space or ask for a larger quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EACCES: "change the permissions or use another folder",
    errno.EPERM: "change the permissions or use another folder",
    errno.EROFS: "use a folder on another disk",
}


class UserError(Exception):
    """An error that the user can mend. Its text is one sentence: the cause and what to do next."""


class Unreachable(UserError):
    """A model or data set that is not on this machine and cannot be loaded from the Hub."""

    def __init__(self, name: str, reason: Exception):
        super().__init__(f"{name}: cannot be loaded from the Hub ({one_line(reason)})")
        self.name = name


def one_line(error: BaseException) -> str:
    """Return the text of an error without line breaks."""
    return " ".join(str(error).split())


def of_disk(error: BaseException) -> UserError | None:
    """The UserError for an error in REMEDIES; None for all others.

    safetensors raises no OSError; the number of its error is only in the text.
    """
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    if number not in REMEDIES:
        return None
    file = getattr(error, "filename", None)
    condition = os.strerror(number) + (f": {file}" if file else "")
    return UserError(f"{condition}; {REMEDIES[number]}, then start the same command again")


@contextmanager
def disk_as_user_error() -> Iterator[None]:
    """Turn the errors in REMEDIES into UserErrors; all others pass."""
    try:
        yield
    except Exception as error:
        if known := of_disk(error):
            raise known from error
        raise
