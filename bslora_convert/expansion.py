"""A compact adapter back as the standard PEFT LoRA that equals it: ranks of the parts add up, scaling is folded into B."""

from pathlib import Path
from typing import Any

import torch

from bslora_convert.bslora.factors import Factors
from bslora_convert.bslora.storage import load_compact
from bslora_convert.errors import RecipeError
from bslora_convert.fit.lowrank import Grams, product_svd, residual_energy
from bslora_convert.landing import check_output, landing
from bslora_convert.lora import load_lora
from bslora_convert.lora.writer import WEIGHTS_NAME, save_lora
from bslora_convert.recipe import DTYPES
from bslora_convert.tensorfile import dtype_name
from bslora_convert.tokenizer import copy_tokenizer


def expand(
    compact: str | Path,
    out: str | Path,
    *,
    rank: int | str | None = None,
    base_model: str | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a compact directory as a PEFT LoRA directory and returns what was written.

    rank: a number re-truncates every module that has more; "uniform" pads every module with zeros to the largest rank.
    base_model: replaces `base_model_name_or_path`. dtype: storage, auto = the compact adapter's.

    :raises InputError: when the compact directory is missing or damaged.
    :raises RecipeError: for a rank or dtype that is not allowed.
    :raises OutputError: when the output place can't be used.
    """
    out = Path(out)
    if rank is not None and rank != "uniform" and not (isinstance(rank, int) and rank > 0):
        raise RecipeError(f"rank is {rank!r}: a positive whole number or uniform is allowed")
    if dtype not in DTYPES:
        raise RecipeError(f"dtype is {dtype!r}: one of {', '.join(DTYPES)} is allowed")
    check_output(out, overwrite)
    adapter = load_compact(compact)
    form = adapter.form
    limit = rank if isinstance(rank, int) else None
    modules = {name: _shrink(form.delta(name), limit) for name in form.modules}
    largest = max(factors.rank for factors in modules.values())
    # A module without any part still needs factors that PEFT can load: rank 1, zero.
    least = largest if rank == "uniform" else 1
    modules = {name: _pad(factors, least) for name, factors in modules.items()}
    config = dict(adapter.config)
    if base_model is not None:
        config["base_model_name_or_path"] = base_model
    stored = adapter.dtype if dtype == "auto" else getattr(torch, dtype)
    kinds = {name: module.kind for name, module in form.modules.items()}
    with landing(out, overwrite) as place:
        save_lora(place, modules, kinds, adapter.carried, config, stored)
        copy_tokenizer(Path(compact), place)
        written = load_lora(place)
        lost = energy = 0.0
        for name in form.modules:
            target = form.delta(name)
            grams = Grams.of(target)
            energy += grams.energy
            lost += residual_energy(target, grams, written.modules[name].factors())
        ranks = [module.rank for module in written.modules.values()]
        return {
            "modules": len(ranks),
            "ranks": {"min": min(ranks), "max": max(ranks)},
            "parameters": written.parameters,
            "bytes": (place / WEIGHTS_NAME).stat().st_size,
            "dtype": dtype_name(stored),
            "base_model": written.config.raw.get("base_model_name_or_path"),
            "relative_error": (lost / energy) ** 0.5 if energy else 0.0,
        }


def _shrink(factors: Factors, rank: int | None) -> Factors:
    """The best part of at most `rank`; the factors as they are where they have no more."""
    if rank is None or factors.rank <= rank:
        return factors
    return product_svd(Grams.of(factors)).truncate([factors], rank)


def _pad(factors: Factors, rank: int) -> Factors:
    """The same matrix with zero columns and rows up to `rank`."""
    missing = max(rank - factors.rank, 0)
    return Factors(
        torch.nn.functional.pad(factors.b, (0, missing)), torch.nn.functional.pad(factors.a, (0, 0, 0, missing))
    )
