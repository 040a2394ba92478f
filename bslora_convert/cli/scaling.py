"""Options for a LoRA whose configuration does not say how it is scaled."""

from typing import Any

import click

SCALING = (
    click.option("--lora-alpha", type=float, help="The source's lora_alpha, where its configuration lacks it."),
    click.option(
        "--use-rslora", is_flag=True, default=None, help="The source is scaled by alpha / √r, where it does not say so."
    ),
)


def scaling_options(function: Any) -> Any:
    """`--lora-alpha` and `--use-rslora`."""
    for option in reversed(SCALING):
        function = option(function)
    return function
