"""What is installed only on request: the packages that an extra of pyproject.toml brings, asked for before any work is done."""

from importlib.util import find_spec

from bslora_convert.errors import RecipeError

EXTRAS = {
    "analysis": ("sklearn",),
    "base": ("accelerate", "peft", "transformers"),
    "eval": ("lm_eval",),
    "gguf": ("gguf",),
    "hub": ("huggingface_hub",),
    "ray": ("ray",),
}


def need(extra: str, what: str, *fields: str) -> None:
    """Refuses what can't run without an extra; nothing is imported.

    what: is going to use it, the message's first words. fields: the options among them, as for `RecipeError`.

    :raises RecipeError: naming what is missing, the extra and how it is installed.
    """
    missing = [package for package in EXTRAS[extra] if not _is_installed(package)]
    if missing:
        raise RecipeError(
            f"{what} needs {', '.join(missing)}, the extra `{extra}`: in a checkout of bslora-convert, "
            f"pip install -c constraints.txt '.[{extra}]'",
            *fields,
        )


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False
