"""`--push`: a result onto the Hub, once it lies here."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from bslora_convert.cli.options import Flag
from bslora_convert.files import hub
from bslora_convert.recipe.options import OUTPUT


def push_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--push` and `--push-dry-run`."""
    dry = click.option(
        "--push-dry-run", is_flag=True, cls=Flag, section=OUTPUT,
        help="With --push: say what would be uploaded, and upload nothing.",
    )  # fmt: skip
    push = click.option(
        "--push", metavar="ORG/NAME", cls=Flag, section=OUTPUT,
        help="Upload the result to this repository of the Hub; a library into folders.",
    )  # fmt: skip
    return push(dry(function))


def look_at_push(repo: str | None, dry_run: bool) -> None:
    """Refuses what can't be pushed before anything is computed.

    :raises click.UsageError: for --push-dry-run alone. For the rest as `hub.check_push`.
    """
    if repo is None:
        if dry_run:
            raise click.UsageError("--push-dry-run says what --push would do; give that as well")
        return
    hub.check_push(repo, dry_run)


def pushed(place: Path, repo: str | None, dry_run: bool) -> dict[str, Any]:
    """`{"push": …}` of a result that was pushed; nothing where nothing was asked for."""
    if repo is None:
        return {}
    from bslora_convert.bslora.common import needed_by

    return {"push": hub.push(place, repo, beside=needed_by(place), dry_run=dry_run)}


def push_line(done: Mapping[str, Any]) -> str:
    """What was pushed, as a sentence."""
    verb = "Would push" if done["dry_run"] else "Pushed"
    return f"{verb} {done['files']} files, {done['bytes']:,} bytes, to https://huggingface.co/{done['repo']}"
