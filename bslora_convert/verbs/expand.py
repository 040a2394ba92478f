"""A compact adapter in a layout that others read: a standard PEFT LoRA, what an engine loads of it, or the authors' layout.

In a LoRA the ranks of the parts add up and scaling is folded into B. The authors' layout keeps the form, with a copy of what is
shared under every module.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bslora_convert.bslora.form import LEVELS, BsloraForm
from bslora_convert.bslora.layout import Layout
from bslora_convert.bslora.official import is_official, load_official, save_official
from bslora_convert.bslora.storage import CompactAdapter, load_compact
from bslora_convert.errors import Refused
from bslora_convert.extras import need
from bslora_convert.files.address import resolve
from bslora_convert.files.base import base_layers
from bslora_convert.files.card import carried
from bslora_convert.files.hashing import sha256
from bslora_convert.files.integrity import AS_WRITTEN
from bslora_convert.files.landing import check_output, landing
from bslora_convert.files.record import EXPANSION_NAME, recorded, seal
from bslora_convert.files.store import as_written
from bslora_convert.files.tensorfile import dtype_name
from bslora_convert.files.travel import copy_travelling
from bslora_convert.layers.slots import bytes_of, target_modules, width_of
from bslora_convert.lora import load_lora
from bslora_convert.lora.experts import beside
from bslora_convert.lora.writer import WEIGHTS_NAME, save_lora
from bslora_convert.modules.factors import Factors
from bslora_convert.modules.lowrank import Grams, product_svd, residual_energy
from bslora_convert.notes import Note
from bslora_convert.recipe.expanding import UNIFORM, ExpandOptions
from bslora_convert.recipe.options import built
from bslora_convert.report import expansion
from bslora_convert.results.adapter import Expanded, OriginalRecord, ServedRecord
from bslora_convert.serving import mlx
from bslora_convert.serving.engines import ENGINES, Engine
from bslora_convert.serving.gguf import GGUF_NAME, Base, read_base, read_gguf, write_gguf
from bslora_convert.serving.shape import advice, heads, listed, reasons, shaped, towers
from bslora_convert.version import __version__

SCHEMA_VERSION = 1  # of expansion.json
USUAL = ENGINES["vllm"]  # whose slots are told where no engine is named
Modules = Mapping[str, Factors]


def expand(
    compact: str | Path,
    out: str | Path,
    options: ExpandOptions | None = None,
    *,
    recorded_as: str | None = None,
    **fields: Any,
) -> Expanded:
    """Writes a compact directory, or one in the authors' layout, as others read it and returns what was written.

    compact: a directory, a URL, or `LIBRARY::ID` for an adapter of a library. options, or fields of `ExpandOptions`; without any
    a PEFT LoRA. recorded_as: what the record calls the source, instead of `compact`.

    :raises InputError: when the source directory is missing or damaged.
    :raises Refused: when the format can't hold the adapter or the engine can't serve it, or the source can't be read faithfully.
    :raises RecipeError: for an option that is not allowed, or an extra that is missing.
    :raises OutputError: when the output place can't be used.
    """
    plan = planned(options, fields)
    out, source = Path(out), resolve(compact)
    check_output(out, plan.overwrite, source)
    adapter, weights = _load(source, plan.accept_changed)
    own = recorded(adapter.path)
    config = dict(adapter.config)
    if plan.base_model is not None and plan.layout != "gguf":
        config["base_model_name_or_path"] = plan.base_model
    stored = plan.stored(dtype_name(adapter.dtype))
    if plan.layout != "official":
        modules = _modules(adapter, plan)
    with landing(out, plan.overwrite) as place:
        if plan.layout == "official":
            result = _write_official(adapter, place, config, stored)
        else:
            result = WRITERS[plan.layout](adapter, modules, place, config, stored, plan)
            result["relative_error"] = _error(adapter.form, result.pop("written"))
        said = advice(plan.reader, adapter.form.modules, adapter.carried) if plan.reader else _dropped(adapter, plan)
        notes = [
            *adapter.notes,
            *said,
            *(copy_travelling(adapter.path, place) if plan.layout in ("lora", "official") else ()),
        ]
        for name in plan.reader.left if plan.reader else ():
            (place / name).unlink(missing_ok=True)
        record = Expanded(
            schema_version=SCHEMA_VERSION,
            tool_version=__version__,
            source={"path": recorded_as or as_written(compact), "sha256": sha256(weights)},
            format=plan.layout,
            engine=plan.engine,
            **result,
            original=_original(own, result["relative_error"]),
            dtype=stored,
            base_model=config.get("base_model_name_or_path"),
            drawn=config.get("drawn") if plan.layout == "lora" else None,
            notes=notes,
        )
        expansion.write(place, record, config, carried(adapter.path))
        return replace(record, files=seal(place, EXPANSION_NAME, record.to_dict()))


def planned(options: ExpandOptions | None, fields: Mapping[str, Any]) -> ExpandOptions:
    """The options of `expand`, checked before anything is read.

    :raises RecipeError: for one that is not allowed, or an extra that is missing.
    """
    plan = built(ExpandOptions, options, fields)
    if plan.layout == "gguf":
        need("gguf", "format gguf", "format")
    return plan


def _load(path: Path, accept_changed: bool) -> tuple[CompactAdapter, Path]:
    """A compact directory, or one in the authors' layout as if it were compact, and the file of its weights."""
    if not is_official(path):
        return load_compact(path, accept_changed=accept_changed), path / WEIGHTS_NAME
    official = load_official(path)
    found = CompactAdapter(
        official.form, Layout.of(official.form), {}, official.inherited, official.weights.parent, integrity=AS_WRITTEN
    )
    return found, official.weights


def _modules(adapter: CompactAdapter, plan: ExpandOptions) -> Modules:
    """The modules' factors as they are to be written.

    :raises Refused: when the engine can't serve them.
    """
    form = adapter.form
    limit = plan.rank if isinstance(plan.rank, int) else None
    modules: Modules = {name: _shrink(form.delta(name), limit) for name in form.modules}
    largest = max(1, *(factors.rank for factors in modules.values()))
    if plan.rank == UNIFORM:
        modules = {name: factors.padded(largest) for name, factors in modules.items()}
    if plan.reader is None:
        return modules
    kinds = {name: module.kind for name, module in form.modules.items()}
    why = reasons(plan.reader, kinds, adapter.carried, largest)
    if why:
        raise Refused(f"{adapter.path}: {plan.reader.title} can't serve it: " + "; ".join(why))
    return shaped(modules, plan.reader, base_layers(plan.base_model))


def _dropped(adapter: CompactAdapter, plan: ExpandOptions) -> list[str]:
    """What PEFT will leave out of the LoRA that is written for it."""
    names = beside(adapter.form.modules) if plan.layout == "lora" else []
    if not names:
        return []
    said = (
        f"PEFT under transformers 5 drops {len(names)} updates that are called as experts are, for example of {names[0]}; the "
        "compact form loads whole, and so does this one under transformers 4"
    )
    return [str(Note(said, "attention"))]


def _write_lora(
    adapter: CompactAdapter, modules: Modules, place: Path, config: Mapping[str, Any], dtype: str, plan: ExpandOptions
) -> dict[str, Any]:
    known = adapter.form.modules
    kinds = {name: known[name].kind if name in known else "linear" for name in modules}
    whole = heads(plan.reader, adapter.carried) if plan.reader else adapter.carried
    config = listed(config, modules, whole) if plan.reader else config
    save_lora(place, modules, kinds, whole, config, getattr(torch, dtype))
    written = load_lora(place)
    return {
        **_sizes({name: module.stored for name, module in written.modules.items()}, place / WEIGHTS_NAME),
        "served": _served(written.modules, plan.reader or USUAL),
        "written": lambda name: written.modules[name].factors(),
    }


def _write_gguf(
    adapter: CompactAdapter, modules: Modules, place: Path, config: Mapping[str, Any], dtype: str, plan: ExpandOptions
) -> dict[str, Any]:
    assert plan.base_model is not None  # `ExpandOptions` asks for it
    base: Base = read_base(plan.base_model)
    path = place / GGUF_NAME
    write_gguf(path, {name: factors.padded(1) for name, factors in modules.items()}, base, dtype)
    written = read_gguf(path, modules, base)
    return {
        **_sizes(written, path),
        "architecture": base.architecture.name,
        "served": None,
        "written": written.__getitem__,
    }


def _write_mlx(
    adapter: CompactAdapter, modules: Modules, place: Path, config: Mapping[str, Any], dtype: str, plan: ExpandOptions
) -> dict[str, Any]:
    mlx.write_mlx(place, modules, config.get("base_model_name_or_path"), getattr(torch, dtype))
    written = mlx.read_mlx(place, modules)
    return {**_sizes(written, place / mlx.WEIGHTS_NAME), "served": None, "written": written.__getitem__}


WRITERS: dict[str, Callable[..., dict[str, Any]]] = {"lora": _write_lora, "gguf": _write_gguf, "mlx": _write_mlx}


def _write_official(adapter: CompactAdapter, place: Path, config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    if adapter.carried:
        raise Refused(
            f"{adapter.path}: the adapter carries {next(iter(adapter.carried))}, and the authors' layout holds factors only; "
            "expand it to a LoRA instead"
        )
    save_official(adapter.form.to(getattr(torch, dtype)), place, config)
    written = load_official(place)
    local = max(module.local.rank for module in written.form.modules.values())
    return {
        "modules": len(written.form.modules),
        "ranks": {"local": local, **{level: written.form.shared_rank(level) for level in LEVELS}},
        "parameters": written.stored,
        "bytes": (place / WEIGHTS_NAME).stat().st_size,
        "served": None,
        "relative_error": _error(adapter.form, written.form.delta),
    }


def _sizes(modules: Modules, file: Path) -> dict[str, Any]:
    ranks = [factors.rank for factors in modules.values()]
    return {
        "modules": len(ranks),
        "ranks": {"min": min(ranks), "max": max(ranks)},
        "parameters": sum(factors.parameters for factors in modules.values()),
        "bytes": file.stat().st_size,
    }


def _served(modules: Mapping[str, Any], engine: Engine) -> ServedRecord:
    """What a server reserves for it: the rank that it has to be started with, and the bytes of one slot in half precision.

    Both are None where no slot holds the rank.
    """
    rank = engine.slot(max(module.rank for module in modules.values()))
    width = width_of({name: module.shape for name, module in modules.items()})
    return ServedRecord(
        max_lora_rank=rank,
        slot_bytes=bytes_of(rank, width) if rank else None,
        target_modules=target_modules(modules),
        options=[engine.towers] if engine.towers and towers(modules) else None,
    )


def _original(own: Mapping[str, Any], added: float) -> OriginalRecord | None:
    """How far off the LoRA is that the compact adapter was made from, at most: ‖ΔW − ΔŴ‖ / ‖ΔW‖, by what its record says.

    added: the error of what was written against the compact form.
    """
    known = own.get("weight", {}).get("relative_error") if isinstance(own.get("weight"), dict) else None
    if not isinstance(known, int | float):
        return None
    return OriginalRecord(sha256=own.get("source", {}).get("sha256"), relative_error=known + added * (1 + known))


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
