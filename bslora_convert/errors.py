"""One class for each kind of failure, each with the exit code that the command line gives it.

The message of every error says what is wrong, where (file and tensor) and what to do about it.
"""

from typing import Any


class BsloraConvertError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 2


class InputError(BsloraConvertError):
    """A file or directory is missing, damaged, inconsistent or hostile."""


class RecipeError(BsloraConvertError, ValueError):
    """An option has a value that it may not have, or two options exclude each other.

    fields: the options that the message names, as Python calls them; where each stands first, the command line writes its own
    name for it.
    """

    def __init__(self, message: str, *fields: str) -> None:
        super().__init__(message)
        self.fields = fields


class OutputError(BsloraConvertError):
    """The output place can't be used."""


class Unsaved(OutputError):
    """A result that was computed and could not be kept; `record` holds it."""

    def __init__(self, message: str, record: Any) -> None:
        super().__init__(message)
        self.record = record


class Refused(BsloraConvertError):
    """A valid adapter that can't be converted faithfully; the message says why."""

    exit_code = 3


class ThresholdMissed(BsloraConvertError):
    """The work was done but what was asked of the result could not be met."""

    exit_code = 1


def reason_of(error: BaseException) -> str:
    """The first line of what another library's error says, its name where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
