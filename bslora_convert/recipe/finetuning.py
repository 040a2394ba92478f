"""What `finetune` is asked for beside a `Training`."""

from dataclasses import dataclass
from pathlib import Path

from bslora_convert.recipe.options import TRAINING as SECTION
from bslora_convert.recipe.options import accept_changed_option, base_dtype_option, device_option, option
from bslora_convert.recipe.output import OutputOptions


@dataclass(frozen=True, slots=True)
class FinetuneOptions(OutputOptions):
    """heldout: a share of the rows in place of the training's, or a file of rows. base_dtype: that the base model runs in."""

    heldout: float | str | Path | None = option(
        None, "Choose the state that is kept on this share of the rows, or on the rows of this file.", SECTION,
        metavar="F|FILE", usual="0.1",
    )  # fmt: skip
    resume: bool = option(False, "Go on where an interrupted run stopped.", SECTION)
    accept_changed: bool = accept_changed_option()
    device: str = device_option()
    base_dtype: str = base_dtype_option(flag="--dtype")
