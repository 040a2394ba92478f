"""Which of several processes writes: the first of those that `accelerate launch` started, or the only one."""

import json
from pathlib import Path
from typing import Any

from bslora_convert.files.record import FIDELITY_NAME


def is_writer() -> bool:
    """Whether this process writes results and speaks."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def written_by_another(out: Path) -> dict[str, Any]:
    """Waits for the process that writes, and returns the record of the directory that it wrote."""
    meet()
    value: dict[str, Any] = json.loads((out / FIDELITY_NAME).read_text(encoding="utf-8"))
    return value


def meet() -> None:
    """Waits until every process has come as far as this."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()
