"""What an error says on the command line: options by their names there, and a reason for what failed outside, in one line."""

import errno
import re
from collections.abc import Iterator

import click

from bslora_convert.errors import BsloraConvertError, RecipeError, reason_of
from bslora_convert.files.store import as_written, is_url

# Modules whose errors are of the network, by the names of the errors: none of the packages is imported for the question.
NETWORK = {
    "httpx": ("TransportError",),
    "httpx2": ("TransportError",),
    "httpcore": ("NetworkError", "TimeoutException"),
    "httpcore2": ("NetworkError", "TimeoutException"),
    "requests": ("ConnectionError", "Timeout"),
    "aiohttp": ("ClientConnectionError",),
    "huggingface_hub": ("HfHubHTTPError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "HFValidationError"),
    "botocore": ("BotoCoreError", "ClientError"),
    "socket": ("gaierror",),
}


def words(error: BsloraConvertError) -> str:
    """The message, with options as they are written on the command line where it names any."""
    message = str(error)
    if not isinstance(error, RecipeError):
        return message
    known = _options()
    for name in error.fields:
        if name in known:
            message = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", known[name], message, count=1)
    return message


def unreachable(error: BaseException) -> str | None:
    """One line for an error of the network or of a hub; None for any other."""
    for cause in _causes(error):
        names = {kind.__name__ for kind in type(cause).__mro__}
        packages = {kind.__module__.partition(".")[0] for kind in type(cause).__mro__}
        if any(package in packages and names & set(kinds) for package, kinds in NETWORK.items()):
            return f"{_addresses()} can't be reached ({reason_of(cause)}); check it and the network, or give a local directory"
        if isinstance(cause, OSError) and cause.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ECONNREFUSED):
            return f"the network can't be reached ({cause.strerror}); give a local directory"
    return None


def _addresses() -> str:
    """Whatever of the arguments has a scheme."""
    context = click.get_current_context(silent=True)
    given = context.params.values() if context is not None else ()
    return ", ".join(as_written(value) for value in given if is_url(value)) or "what was asked for"


def _options() -> dict[str, str]:
    """Name of each option's value -> how it is written: `max_error` -> `--max-error`, `out_dir` -> `OUT_DIR`."""
    context = click.get_current_context(silent=True)
    if context is None:
        return {}
    return {
        parameter.name: max(parameter.opts, key=len) if isinstance(parameter, click.Option) else parameter.name.upper()
        for parameter in context.command.params
        if parameter.name is not None
    }


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
