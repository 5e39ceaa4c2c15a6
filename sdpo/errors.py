"""Errors that the program tells apart. Only `UserError` is shown as one line; any other keeps its traceback."""


class UserError(Exception):
    """Something that the user can mend; its text is one sentence that names the cause and the next thing to do."""


class Unreachable(UserError):
    """A model or data set that is neither on this machine nor can be loaded from the Hub."""

    def __init__(self, name: str, reason: Exception):
        super().__init__(f"{name}: cannot be loaded from the Hub ({one_line(reason)})")
        self.name = name


def one_line(error: BaseException) -> str:
    """The text of an error without line breaks."""
    return " ".join(str(error).split())
