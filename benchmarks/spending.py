"""What bits should be spent by: the KL of a file in codes by the power with which a module's size counts.

    python benchmarks/spending.py LORA --base-model BASE --prompts ROWS.jsonl [--limit 30] [--bytes 0.125,0.0625,0.03125]
        [--powers 0,0.3,0.4,0.5,0.7,1] [--fed PROMPTS.jsonl]

An error in a module (out, in) counts by (out · in)^−p (`coding/form.py`); 0 is the error of the weights. A row is a fit and a
measurement, half a minute of CPU time each for the adapter of fixtures/. With --fed another table comes first: E‖x‖²‖g‖² on
PROMPTS, x what a module is fed and g the loss's gradient at its output, as the geometric mean of each kind beside that of all.
"""

import argparse

import numpy as np
from rich.console import Console
from rich.table import Table

from bslora_convert import Recipe, compress, verify
from bslora_convert.behaviour.adapter import read_adapter
from bslora_convert.behaviour.calibrate import collect
from bslora_convert.behaviour.prompts import Prompts
from bslora_convert.behaviour.session import BaseModelSession
from bslora_convert.coding import components
from bslora_convert.modules.names import kind_of
from bslora_convert.process.progress import silent


def powers(options: argparse.Namespace) -> Table:
    """E‖x‖²‖g‖² of each kind of module, and a number of its update."""
    session = BaseModelSession(read_adapter(options.lora), options.base_model, "cpu", "auto", silent)
    factors = {name: module.local for name, module in session.adapter.form.modules.items()}
    rows = session.encode(Prompts.read(options.fed)).examples
    moments = collect(session.base, session.reference, factors, rows, 8, gradients=True)
    logs = {name: np.log(moments[name].fed_power) for name in factors}
    sizes = {name: np.log(np.prod(part.shape)) for name, part in factors.items()}
    table = Table()
    for column in ("kind", "power / mean", "a number / mean"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind in sorted({kind_of(name) for name in factors}):
        own = [name for name in factors if kind_of(name) == kind]
        each = [np.mean([logs[n] - size * sizes[n] for n in own]) - np.mean([logs[n] - size * sizes[n] for n in logs])
                for size in (0, 1)]  # fmt: skip
        table.add_row(kind, *(f"{np.exp(value):.2f}" for value in each))
    return table


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora")
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--limit", type=int, default=30)
    parser.add_argument("--bytes", default="0.125,0.0625,0.03125")
    parser.add_argument("--powers", default="0,0.3,0.4,0.5,0.7,1")
    parser.add_argument("--out", default="build/spending")
    parser.add_argument("--fed")
    options = parser.parse_args()
    if options.fed:
        Console().print(powers(options))
    table = Table()
    for column in ("bytes", "power", "energy lost", "KL", "retention", "same first choice"):
        table.add_column(column, justify="right")
    for share in map(float, options.bytes.split(",")):
        for power in map(float, options.powers.split(",")):
            components.SIZE_POWER = power
            record = compress(
                options.lora, options.out, Recipe(transform="none", bytes=share), overwrite=True, report_html=False
            )
            found = verify(
                options.out, base_model=options.base_model, reference=options.lora, prompts=options.prompts,
                limit=options.limit, max_new_tokens=0,
            )  # fmt: skip
            table.add_row(
                f"{share:.3%}", f"{power:g}", f"{record['weight']['relative_error'] ** 2:.2%}", f"{found['kl']:.6f}",
                f"{found['retention']:.3%}", f"{found['agreement']:.1%}",
            )  # fmt: skip
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
