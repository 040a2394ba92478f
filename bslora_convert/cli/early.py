"""What a verb can refuse before anything heavy is imported: paths that are not there, outputs that can't be used, base models."""

from collections.abc import Iterable
from pathlib import Path

from bslora_convert.errors import InputError
from bslora_convert.files.address import resolve
from bslora_convert.files.base import check_base
from bslora_convert.files.landing import check_apart, check_output


def look(
    adapters: Iterable[str | Path] = (),
    *,
    out: Path | None = None,
    overwrite: bool = False,
    files: Iterable[str | Path | None] = (),
    base_model: str | Path | None = None,
) -> None:
    """Checks what a verb was given.

    adapters: directories or files that it reads, which its output must stay apart from. files: other files that it reads.

    :raises InputError: for what is missing. :raises OutputError: for an output that can't be used.
    """
    for given in adapters:
        path = resolve(given)
        if not path.exists():
            raise InputError(f"{path}: no such file or directory")
        if out is not None:
            check_apart(path, out)
    for file in files:
        if file is not None and not Path(file).is_file():
            raise InputError(f"{file}: no such file")
    if out is not None:
        check_output(out, overwrite)
    if base_model is not None:
        check_base(base_model)
