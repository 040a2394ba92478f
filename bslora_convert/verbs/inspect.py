"""What an adapter holds, where its bytes are, whether it can be converted, and what its slots on a server take."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bslora_convert.bslora.form import LEVELS, BsloraForm
from bslora_convert.bslora.official import OFFICIAL_TYPE, OfficialAdapter, load_official
from bslora_convert.bslora.official.plan import KEY
from bslora_convert.bslora.storage import PEFT_TYPE, CompactAdapter, load_compact
from bslora_convert.conversion.initial import describe, look_for
from bslora_convert.conversion.sizes import sizes
from bslora_convert.errors import Refused
from bslora_convert.files.address import resolve
from bslora_convert.files.jsonfile import read_json
from bslora_convert.files.tensorfile import dtype_name, read_tensors
from bslora_convert.fit.source import Source, check_magnitude, measure
from bslora_convert.layers.slots import slot_bytes
from bslora_convert.lora import LoraAdapter, load_lora
from bslora_convert.lora.keys import EMBEDDING_FACTOR, FACTOR, names_of
from bslora_convert.lora.place import CONFIG_NAME, locate
from bslora_convert.modules.factors import Shape
from bslora_convert.modules.names import kind_of
from bslora_convert.recipe.options import built
from bslora_convert.recipe.reading import Reading
from bslora_convert.results.adapter import Inspection


def inspect(path: str | Path, reading: Reading | None = None, **fields: Any) -> Inspection:
    """Describes a LoRA directory, a compact one or one in the BSLoRA authors' layout.

    reading, or fields of `Reading`: what the caller knows of a LoRA whose configuration does not say it.

    :raises InputError: when files are missing or damaged.
    """
    path = resolve(path)
    directory, weights = locate(path)
    config = read_json(directory / CONFIG_NAME)
    kind = config.get("peft_type", "LORA")
    head: dict[str, Any] = {"base_model": config.get("base_model_name_or_path"), "bytes": weights.stat().st_size}
    if kind == PEFT_TYPE:
        return _compact(load_compact(directory, accept_changed=True), head)
    try:
        if kind == OFFICIAL_TYPE:
            return _official(load_official(path), head)
        adapter = load_lora(path, **built(Reading, reading, fields).arguments)
    except Refused as refusal:
        named = "official-bslora" if kind == OFFICIAL_TYPE else "lora"
        return Inspection(kind=named, convertible=False, reasons=[str(refusal)], **head, **_raw(weights, config))
    return _lora(adapter, path, config, head)


def _lora(adapter: LoraAdapter, path: Path, config: Mapping[str, Any], head: Mapping[str, Any]) -> Inspection:
    shapes = {name: module.shape for name, module in adapter.modules.items()}
    ranks = {name: module.rank for name, module in adapter.modules.items()}
    source = measure(adapter.modules, adapter.kinds)
    check_magnitude(source, adapter.weights)
    known = look_for(adapter, "auto")
    source = replace(source, initial=None if known is None else known.initial)
    return Inspection(
        kind="lora",
        convertible=True,
        reasons=[],
        **head,
        modules=len(adapter.modules),
        parameters=adapter.parameters,
        dtype=dtype_name(adapter.dtype),
        bytes_by_part=_lora_bytes(adapter, config),
        **_ranks(shapes, list(ranks.values()), ranks),
        spectra=_spectra(source, adapter),
        sizes=sizes(source, adapter, path),
        initialisation=None if known is None else describe(known, adapter),
        notes=list(adapter.notes),
    )


def _compact(adapter: CompactAdapter, head: Mapping[str, Any]) -> Inspection:
    parts = {name.removeprefix("bslora_"): tensor.nbytes for name, tensor in adapter.codes.items()}
    return Inspection(
        kind="bslora",
        convertible=False,
        reasons=["already in BSLoRA form; `expand` gives the LoRA back"],
        **head,
        bytes_by_part=(parts or _parts(adapter.form)) | _carried_bytes(adapter.carried, adapter.config),
        **_form(adapter.form) | {"parameters": adapter.parameters},
        integrity=adapter.integrity,
        notes=[],
    )


def _official(adapter: OfficialAdapter, head: Mapping[str, Any]) -> Inspection:
    width = adapter.dtype.itemsize
    repeated = {"copies": adapter.copied * width}
    idle = adapter.stored - adapter.copied - adapter.form.parameters
    if idle:
        repeated["without_effect"] = idle * width  # kernels and gates of a path of rank 0
    return Inspection(
        kind="official-bslora",
        convertible=True,
        reasons=[],
        **head,
        bytes_by_part=_parts(adapter.form) | repeated,
        **_form(adapter.form),
        stored_parameters=adapter.stored,
        notes=list(adapter.notes),
    )


def _form(form: BsloraForm) -> dict[str, Any]:
    """What there is to say of a form."""
    shapes = {name: module.shape for name, module in form.modules.items()}
    return {
        "modules": len(form.modules),
        "parameters": form.parameters,
        "dtype": dtype_name(next(form.tensors()).dtype),
        **_ranks(
            shapes,
            [module.local.rank for module in form.modules.values()],
            {name: form.expanded_rank(name) for name in form.modules},
        ),
        "transform": form.transform_name,
        "shared_ranks": {level: form.shared_rank(level) for level in LEVELS},
    }


def _parts(form: BsloraForm) -> dict[str, int]:
    """Bytes of a form's parts in floats."""
    width = next(form.tensors()).dtype.itemsize
    return {part: count * width for part, count in form.parts_parameters().items()}


def _ranks(shapes: Mapping[str, Shape], own: Sequence[int], expanded: Mapping[str, int]) -> dict[str, Any]:
    """Ranks, slots and kinds. own: ranks that modules hold for themselves. expanded: of the LoRA that it is or expands to."""
    largest = max(expanded.values())
    return {
        "ranks": {"min": min(own), "max": max(own)},
        "expanded_rank": largest,
        "slot_bytes": slot_bytes(shapes, largest),
        "kinds": _kinds(shapes, expanded),
    }


def _lora_bytes(adapter: LoraAdapter, config: Mapping[str, Any]) -> dict[str, int]:
    parts = {"lora": 0}
    for module in adapter.modules.values():
        part = "lora" if module.kind == "linear" else "embedding_lora"
        parts[part] = parts.get(part, 0) + module.a.nbytes + module.b.nbytes
    return parts | _carried_bytes(adapter.carried, config)


def _carried_bytes(carried: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, int]:
    parts: dict[str, int] = {}
    for name, tensor in carried.items():
        part = _carried_part(name, config)
        parts[part] = parts.get(part, 0) + tensor.nbytes
    return parts


def _carried_part(name: str, config: Mapping[str, Any]) -> str:
    """`modules_to_save`, `embeddings` or `other`, from a tensor's name."""
    saved = config.get("modules_to_save") or ()
    parts = name.split(".")
    if any(module in parts or name.startswith(f"{module}.") for module in saved):
        return "modules_to_save"
    if any(word in name for word in ("embed", "lm_head", "wte", "wpe", "shared.", "word_embeddings")):
        return "embeddings"
    return "modules_to_save" if any(word in parts for word in ("classifier", "score")) else "other"


def _raw(weights: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of an adapter that can't be read as what it says it is."""
    parts: dict[str, int] = {}
    ranks, modules, parameters = [], set(), 0
    tensors = read_tensors(weights)
    names, _ = names_of(tensors)
    for key, tensor in tensors.items():
        name = names[key]
        official = KEY.match(name)
        match = official or FACTOR.match(name) or EMBEDDING_FACTOR.match(name)
        if match:
            modules.add(match["module"])
            parameters += tensor.numel()
            if not official and match["side"] == "A" and tensor.ndim:
                ranks.append(tensor.shape[0])
        part = "lora" if ".lora_" in name or "sharelora_" in name else _carried_part(name, config)
        parts[part] = parts.get(part, 0) + tensor.nbytes
    return {
        "modules": len(modules),
        "parameters": parameters,
        "bytes_by_part": parts,
        "ranks": {"min": min(ranks, default=0), "max": max(ranks, default=0)},
        "expanded_rank": max(ranks, default=0),
        "slot_bytes": {},
        "notes": [],
    }


def _kinds(shapes: Mapping[str, Shape], ranks: Mapping[str, int]) -> list[dict[str, Any]]:
    """Modules by kind: how many, which shapes, which ranks."""
    kinds: dict[str, dict[str, Any]] = {}
    for name, shape in shapes.items():
        entry = kinds.setdefault(kind_of(name), {"modules": 0, "shapes": set(), "ranks": []})
        entry["modules"] += 1
        entry["shapes"].add(shape)
        entry["ranks"].append(ranks[name])
    return [
        {
            "kind": kind,
            "modules": entry["modules"],
            "shapes": sorted(map(list, entry["shapes"])),
            "ranks": {"min": min(entry["ranks"]), "max": max(entry["ranks"])},
        }
        for kind, entry in kinds.items()
    ]


def _spectra(source: Source, adapter: LoraAdapter) -> list[dict[str, Any]]:
    """By kind: mean stable rank ‖ΔW‖_F² / ‖ΔW‖₂² and the share of energy in the best half and quarter of the rank."""
    gathered: dict[str, list[tuple[float, float, float]]] = {}
    for name, values in source.spectra.items():
        energy = float(values.sum())
        if energy == 0:
            continue
        rank = adapter.modules[name].rank
        kept = [float(values[: max(rank // part, 1)].sum()) / energy for part in (2, 4)]
        gathered.setdefault(kind_of(name), []).append((energy / float(values[0]), kept[0], kept[1]))
    return [
        {
            "kind": kind,
            **{
                field: sum(row[i] for row in rows) / len(rows)
                for i, field in enumerate(("stable_rank", "energy_at_half_rank", "energy_at_quarter_rank"))
            },
        }
        for kind, rows in gathered.items()
    ]
