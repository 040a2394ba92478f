"""Which of several processes writes: the first of those that `accelerate launch` started, or the only one."""

import json
import os
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


def from_first(value: Any, cpu: bool) -> Any:
    """The first process's value, in each of them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return value
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=cpu)
    values = [value]
    broadcast_object_list(values)
    return values[0]


def meet() -> None:
    """Waits until every process has come as far as this."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()
