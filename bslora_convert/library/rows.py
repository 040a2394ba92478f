"""A row of the manifest, as far as an adapter's own directory says it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bslora_convert.bslora.storage import CONFIG_NAME, WEIGHTS_NAME
from bslora_convert.errors import BsloraConvertError
from bslora_convert.files.jsonfile import read_json
from bslora_convert.files.record import recorded
from bslora_convert.layers.slots import target_modules
from bslora_convert.results.adapter import Fidelity

BEHAVIOUR = ("retention", "kl", "agreement")


def measured(record: Fidelity, config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes, error, and what serving and reading it depend on. config: of the compact directory."""
    compact, source, found = record.compact, record.source, record.initialisation
    return {
        "source_bytes": source.bytes,
        "bytes": compact.bytes,
        "parameters": compact.parameters,
        "parameter_ratio": compact.parameter_ratio,
        "relative_error": record.weight.relative_error,
        "heldout_kl": record.training.heldout_kl_after if record.training is not None else None,
        "settings": {
            **({"initialisation": found.file} if found is not None and found.used else {}),
            "base_model": config.get("base_model_name_or_path"),
            "transform": compact.transform,
            "expanded_rank": compact.expanded_rank,
            "source_rank": source.largest_rank,
            "width": source.width,
            "target_modules": target_modules([module.name for module in record.weight.modules]),
            "sha256": compact.sha256,
            **({"loaded_bytes": compact.loaded_bytes} if compact.loaded_bytes is not None else {}),
        },
    }


def row_of(directory: Path, name: str) -> dict[str, Any]:
    """The row of a compact directory that no manifest names: what its record says, or its size alone."""
    config = read_json(directory / CONFIG_NAME)
    weights = directory / WEIGHTS_NAME
    bare = {
        "id": name,
        "status": "ok",
        "bytes": weights.stat().st_size if weights.is_file() else 0,
        "settings": {"base_model": config.get("base_model_name_or_path")},
    }
    try:
        return bare | measured(Fidelity.from_dict(recorded(directory)), config)
    except (BsloraConvertError, KeyError, TypeError, ValueError):
        return bare


def behaviour_of(directory: Path) -> dict[str, Any] | None:
    """What `verify --save` left in an adapter's record: retention, KL, agreement, rows and when; None without it."""
    try:
        found = recorded(directory).get("functional")
        if not isinstance(found, dict) or not isinstance(found.get("prompts"), dict):
            return None
        said = {name: found.get(name) for name in BEHAVIOUR}
        return said | {"rows": found["prompts"].get("rows"), "when": found.get("when")}
    except BsloraConvertError:
        return None
