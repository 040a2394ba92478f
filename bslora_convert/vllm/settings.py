"""What the plugin is told by the environment."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bslora_convert.errors import InputError, RecipeError
from bslora_convert.files.remote import LOCAL
from bslora_convert.files.store import is_url, parts_of
from bslora_convert.layers.slots import TARGET_MODULES

GIB = 1 << 30
DEFAULT_CACHE = "~/.cache/bslora-convert/vllm"
PLANS = ("lora", "compact")  # what is handed out to vLLM
ANY = "*"  # as an alias: whatever the adapter says that its base is called


@dataclass(frozen=True, slots=True)
class Settings:
    """library: the output of `batch` that is served, a directory or a URL. cache: where snapshots are written.

    cache_bytes: the most they may take. aliases: further names of the served base model in adapters' configurations; "*" is any.
    plan: `lora` hands out a LoRA that was written once, `compact` a copy of the compact adapter, which vLLM's workers decode
    whenever they load it (`worker.py`). rank, kinds: of the server's command line, as far as it says them (`told_by`).

    :raises RecipeError: naming the variable, its value and what is allowed.
    """

    library: Path | str
    cache: Path
    cache_bytes: int = 20 * GIB
    aliases: frozenset[str] = frozenset()
    plan: str = PLANS[0]
    rank: int | None = None
    kinds: frozenset[str] | None = None

    def __post_init__(self) -> None:
        here = Path(self.library)
        if not here.is_dir():
            _check_url(self.library)
        if self.cache_bytes <= 0:
            raise RecipeError(f"BSLORA_CACHE_GIB is {self.cache_bytes / GIB:g}: a positive number is expected")
        if self.plan not in PLANS:
            raise RecipeError(f"BSLORA_PLAN is {self.plan!r}: one of {', '.join(PLANS)} is allowed")
        if here.is_dir() and here.resolve() in (self.cache.resolve(), *self.cache.resolve().parents):
            raise RecipeError(f"BSLORA_CACHE is {self.cache}: a place outside of the library is expected")

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ, command: Sequence[str] = ()) -> "Settings | None":
        """The settings of an environment; None where no library is named. command: the server's command line.

        :raises RecipeError: as the class.
        """
        library = environment.get("BSLORA_LIBRARY")
        if not library:
            return None
        gib = environment.get("BSLORA_CACHE_GIB", "20")
        try:
            most = int(float(gib) * GIB)
        except (ValueError, OverflowError):
            raise RecipeError(f"BSLORA_CACHE_GIB is {gib!r}: a positive number is expected") from None
        return cls(
            library if is_url(library) and not Path(library).is_dir() else Path(library),
            Path(environment.get("BSLORA_CACHE") or DEFAULT_CACHE).expanduser(),
            most,
            aliases_in(environment),
            environment.get("BSLORA_PLAN") or PLANS[0],
            *told_by(command),
        )


def told_by(command: Sequence[str]) -> tuple[int | None, frozenset[str] | None]:
    """(`--max-lora-rank`, the kinds that `--lora-target-modules` makes room for), None where a command line does not say it."""
    said: dict[str, list[str]] = {}
    values: list[str] = []
    for word in command:
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            values = said.setdefault(flag.replace("_", "-"), [])
            values += [value] if value else []
        else:
            values.append(word)
    rank, kinds = said.get("--max-lora-rank", []), said.get(TARGET_MODULES, [])
    return int(rank[0]) if rank and rank[0].isdecimal() else None, frozenset(kinds) or None


def aliases_in(environment: Mapping[str, str]) -> frozenset[str]:
    """Further names of the served base model, in adapters' configurations."""
    return frozenset(name.strip() for name in environment.get("BSLORA_BASE_ALIASES", "").split(",") if name.strip())


def is_strict(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a server that can't serve its tenants is not to start."""
    return environment.get("BSLORA_STRICT", "1") != "0"


def _check_url(library: object) -> None:
    """:raises RecipeError: unless it is a URL that a library may have; the store itself is asked with the first tenant."""
    if not is_url(library):
        raise RecipeError(f"BSLORA_LIBRARY is {library}: a directory that `batch` made, or the URL of one, is expected")
    try:
        scheme, _ = parts_of(library)
    except InputError as error:
        raise RecipeError(f"BSLORA_LIBRARY: {error}") from None
    if scheme in LOCAL:
        raise RecipeError(f"BSLORA_LIBRARY is {library}: a directory of this machine is given by its path")
