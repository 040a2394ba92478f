"""One thing done to every adapter of a converted library; a broken one stops no other."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bslora_convert.errors import Refused
from bslora_convert.process.interrupt import heeded
from bslora_convert.process.progress import Progress

OK, FAILED, REFUSED = "ok", "failed", "refused"


def for_each(
    rows: Sequence[Mapping[str, Any]],
    title: str,
    do: Callable[[Mapping[str, Any], Progress], Mapping[str, Any]],
    progress: Progress,
) -> list[dict[str, Any]]:
    """What was done to each adapter: `id`, `status` (`ok`, `failed`, `refused`), `error`, `message`, and what `do` returns.

    rows: of the manifest. do: takes a row, and says its own steps.
    """
    found = []
    for at, row in enumerate(rows):

        def tell(
            phase: str, /, done: int = 0, total: int = 0, words: str = "", *, at: int = at, name: str = row["id"]
        ) -> None:
            progress(title, at, len(rows), f"{name}, {phase}")

        tell("reading")
        said: dict[str, Any] = {"id": row["id"], "status": OK, "error": None, "message": None}
        try:
            with heeded():
                found.append({**said, **do(row, tell)})
        except Exception as error:  # whatever it was, it is this adapter's and not the library's
            status, kind = REFUSED if isinstance(error, Refused) else FAILED, type(error).__name__
            found.append(said | {"status": status, "error": kind, "message": str(error) or kind})
    return found
