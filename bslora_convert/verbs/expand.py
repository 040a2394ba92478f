"""A compact adapter in a layout that others read: the standard PEFT LoRA that equals it, or the BSLoRA authors' layout.

In a LoRA the ranks of the parts add up and scaling is folded into B. The authors' layout keeps the form, with a copy of what is
shared under every module.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bslora_convert.bslora.form import LEVELS, BsloraForm
from bslora_convert.bslora.official import is_official, load_official, save_official
from bslora_convert.bslora.storage import CompactAdapter, load_compact
from bslora_convert.errors import RecipeError, Refused
from bslora_convert.files.address import resolve
from bslora_convert.files.hashing import sha256
from bslora_convert.files.landing import check_output, landing
from bslora_convert.files.record import AS_WRITTEN, EXPANSION_NAME, seal
from bslora_convert.files.tensorfile import dtype_name
from bslora_convert.files.travel import copy_travelling
from bslora_convert.lora import load_lora
from bslora_convert.lora.writer import WEIGHTS_NAME, save_lora
from bslora_convert.modules.factors import Factors
from bslora_convert.modules.lowrank import Grams, product_svd, residual_energy
from bslora_convert.recipe.checks import check_choice
from bslora_convert.recipe.storage import DTYPES, FORMATS
from bslora_convert.version import __version__

SCHEMA_VERSION = 1  # of expansion.json


def expand(
    compact: str | Path,
    out: str | Path,
    *,
    rank: int | str | None = None,
    base_model: str | None = None,
    dtype: str = "auto",
    format: str = "lora",
    overwrite: bool = False,
    accept_changed: bool = False,
) -> dict[str, Any]:
    """Writes a compact directory, or one in the authors' layout, as a PEFT LoRA directory and returns what was written.

    compact: a directory, or `LIBRARY::ID` for an adapter of a library.

    rank: a number re-truncates every module that has more; "uniform" pads every module with zeros to the largest rank.
    base_model: replaces `base_model_name_or_path`. dtype: storage, auto = the compact adapter's.
    format: "lora", or "official" for the authors' layout. accept_changed: as for `load_compact`.

    :raises InputError: when the source directory is missing or damaged.
    :raises Refused: when the authors' layout can't hold the adapter, or the source in it can't be read faithfully.
    :raises RecipeError: for a rank, dtype or format that is not allowed.
    :raises OutputError: when the output place can't be used.
    """
    out = Path(out)
    check_options(rank, dtype, format)
    source = resolve(compact)
    check_output(out, overwrite, source)
    adapter, weights = _load(source, accept_changed)
    config = dict(adapter.config)
    if base_model is not None:
        config["base_model_name_or_path"] = base_model
    stored = adapter.dtype if dtype == "auto" else getattr(torch, dtype)
    with landing(out, overwrite) as place:
        if format == "official":
            result = _write_official(adapter, place, config, stored)
        else:
            result = _write_lora(adapter, place, config, stored, rank)
        notes = (*adapter.notes, *copy_travelling(adapter.path, place))
        return seal(
            place,
            EXPANSION_NAME,
            {
                "schema_version": SCHEMA_VERSION,
                "tool_version": __version__,
                "source": {"path": str(compact), "sha256": sha256(weights)},
                "format": format,
                **result,
                "bytes": (place / WEIGHTS_NAME).stat().st_size,
                "dtype": dtype_name(stored),
                "base_model": config.get("base_model_name_or_path"),
                "notes": list(notes),
            },
        )


def check_options(rank: int | str | None, dtype: str, format: str) -> None:
    """:raises RecipeError: for a rank, dtype or format that is not allowed, or two that exclude each other."""
    if rank is not None and rank != "uniform" and not (isinstance(rank, int) and rank > 0):
        raise RecipeError(f"rank is {rank!r}: a positive whole number or uniform is allowed", "rank")
    check_choice("dtype", dtype, DTYPES)
    check_choice("format", format, FORMATS)
    if rank is not None and format != "lora":
        raise RecipeError(
            f"rank is {rank!r}: only a LoRA can be re-truncated or padded; leave it out or use format lora",
            "rank",
            "format",
        )


def _load(path: Path, accept_changed: bool) -> tuple[CompactAdapter, Path]:
    """A compact directory, or one in the authors' layout as if it were compact, and the file of its weights."""
    if not is_official(path):
        return load_compact(path, accept_changed=accept_changed), path / WEIGHTS_NAME
    official = load_official(path)
    found = CompactAdapter(official.form, {}, official.inherited, official.weights.parent, integrity=AS_WRITTEN)
    return found, official.weights


def _write_lora(
    adapter: CompactAdapter, place: Path, config: Mapping[str, Any], dtype: torch.dtype, rank: int | str | None
) -> dict[str, Any]:
    form = adapter.form
    limit = rank if isinstance(rank, int) else None
    modules = {name: _shrink(form.delta(name), limit) for name in form.modules}
    if rank == "uniform":
        largest = max(factors.rank for factors in modules.values())
        modules = {name: factors.padded(largest) for name, factors in modules.items()}
    kinds = {name: module.kind for name, module in form.modules.items()}
    save_lora(place, modules, kinds, adapter.carried, config, dtype)
    written = load_lora(place)
    ranks = [module.rank for module in written.modules.values()]
    return {
        "modules": len(ranks),
        "ranks": {"min": min(ranks), "max": max(ranks)},
        "parameters": written.parameters,
        "relative_error": _error(form, lambda name: written.modules[name].factors()),
    }


def _write_official(
    adapter: CompactAdapter, place: Path, config: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    if adapter.carried:
        raise Refused(
            f"{adapter.path}: the adapter carries {next(iter(adapter.carried))}, and the authors' layout holds factors only; "
            "expand it to a LoRA instead"
        )
    save_official(adapter.form.to(dtype), place, config)
    written = load_official(place)
    local = max(module.local.rank for module in written.form.modules.values())
    return {
        "modules": len(written.form.modules),
        "ranks": {"local": local, **{level: written.form.shared_rank(level) for level in LEVELS}},
        "parameters": written.stored,
        "relative_error": _error(adapter.form, written.form.delta),
    }


def _error(form: BsloraForm, written: Callable[[str], Factors]) -> float:
    """‖ΔW − ΔŴ‖ / ‖ΔW‖ of what was written, by module name, over all modules."""
    lost = energy = 0.0
    for name in form.modules:
        target = form.delta(name)
        grams = Grams.of(target)
        energy += grams.energy
        lost += residual_energy(target, grams, written(name))
    return float((lost / energy) ** 0.5) if energy else 0.0


def _shrink(factors: Factors, rank: int | None) -> Factors:
    """The best part of at most `rank`; the factors as they are where they have no more."""
    if rank is None or factors.rank <= rank:
        return factors
    return product_svd(Grams.of(factors)).truncate([factors], rank)
