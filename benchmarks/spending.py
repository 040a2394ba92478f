"""What bits should be spent by: the KL of a file in codes by the power with which a module's size counts.

    python benchmarks/spending.py LORA --base-model BASE --prompts ROWS.jsonl [--limit 30] [--bytes 0.125,0.0625,0.03125]
        [--powers 0,0.3,0.4,0.5,0.7,1]

An error in a module (out, in) counts by (out · in)^−p (`coding/form.py`); 0 is the error of the weights. A row is a fit and a
measurement, half a minute of CPU time each for the adapter of fixtures/.
"""

import argparse

from rich.console import Console
from rich.table import Table

from bslora_convert import Recipe, compress, verify
from bslora_convert.coding import form


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora")
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--limit", type=int, default=30)
    parser.add_argument("--bytes", default="0.125,0.0625,0.03125")
    parser.add_argument("--powers", default="0,0.3,0.4,0.5,0.7,1")
    parser.add_argument("--out", default="build/spending")
    options = parser.parse_args()
    table = Table()
    for column in ("bytes", "power", "energy lost", "KL", "retention", "same first choice"):
        table.add_column(column, justify="right")
    for share in map(float, options.bytes.split(",")):
        for power in map(float, options.powers.split(",")):
            form.EVEN = power
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
