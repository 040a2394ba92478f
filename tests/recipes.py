"""Options that stand in a recipe's file alone, for a command line."""

from pathlib import Path
from typing import Any

from bslora_convert.recipe.files import to_toml


def by_file(path: Path, **options: Any) -> tuple[str, str]:
    """`--recipe FILE` with these options in the file."""
    path.write_text(to_toml(options))
    return "--recipe", str(path)
