"""How far a distillation is, as it lies on disk while it runs: complete or not at all."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from bslora_convert.errors import InputError
from bslora_convert.files.jsonfile import read_json
from bslora_convert.files.landing import replacing
from bslora_convert.files.tensorfile import read_tensors
from bslora_convert.recipe.training import Training

TENSORS_NAME, STATE_NAME = "state.safetensors", "state.json"
FREE = ("max_steps", "epochs", "max_minutes", "patience")  # options that a run which goes on may have others of


@dataclass(slots=True)
class RunState:
    """Counts of a run: steps, evaluations without a better state, the best state's step, held-out KL before and at best."""

    step: int = 0
    stale: int = 0
    kept_step: int = 0
    before: float = math.nan
    lowest: float = math.nan
    log: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0


def save_state(directory: Path, training: Training, state: RunState, tensors: Mapping[str, Tensor]) -> None:
    """Writes a state, which replaces the one before."""
    with replacing(directory) as place:
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, place / TENSORS_NAME)
        (place / STATE_NAME).write_text(json.dumps({"options": training.to_dict(), **asdict(state)}))


def load_state(directory: Path, training: Training) -> tuple[RunState, dict[str, Tensor]]:
    """A state and its tensors.

    :raises InputError: when it is damaged or its options are others.
    """
    found = read_json(directory / STATE_NAME)
    options = found.pop("options", None)
    options = options if isinstance(options, dict) else {}
    for name, value in training.to_dict().items():
        if name not in FREE and options.get(name) != value:
            raise InputError(
                f"{directory / STATE_NAME}: was trained with {name} {options.get(name)!r}, now {value!r}; "
                "give the same options or leave --resume out"
            )
    if set(found) != {one.name for one in fields(RunState)}:
        raise not_of_this_run(directory, f"{STATE_NAME} holds {', '.join(sorted(found))}")
    return RunState(**found), read_tensors(directory / TENSORS_NAME)


def not_of_this_run(directory: Path, error: object) -> InputError:
    """The error of a state that does not fit."""
    return InputError(f"{directory}: not a checkpoint of this adapter ({error})")
