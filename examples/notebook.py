"""Writes `library.ipynb`: the cells of `library.py` with what they print.

python examples/notebook.py
"""

from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
SCRIPT, NOTEBOOK = HERE / "library.py", HERE / "library.ipynb"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def cells_of(script: Path) -> Any:
    """A script's cells as a notebook without outputs, the same for the same script."""
    notebook = jupytext.read(script, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.from_dict({})
    return notebook


def execute(notebook: Any, place: Path) -> Any:
    """Runs every cell in a directory, one process for all, and puts what it printed beneath it.

    :raises nbclient.exceptions.CellExecutionError: with the cell that failed.
    """
    return NotebookClient(notebook, resources={"metadata": {"path": str(place)}}, record_timing=False).execute()


def main() -> None:
    """Writes the notebook."""
    executed = execute(cells_of(SCRIPT), HERE)
    executed.metadata = nbformat.from_dict(METADATA)
    for cell in executed.cells:
        if cell.cell_type == "code":  # what goes to stderr speaks of this machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(executed, NOTEBOOK)


if __name__ == "__main__":
    main()
