"""The authors' `adapter_config.json`: what in it would change the update, and what it says of the tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bslora_convert.bslora.official.plan import MODES, OFFICIAL_TYPE, OfficialPlan
from bslora_convert.bslora.transforms.gate import DEFAULT_SIZE as GATE_SIZE
from bslora_convert.bslora.transforms.kronecker import DEFAULT_SIZE as KRON_SIZE
from bslora_convert.errors import InputError, Refused
from bslora_convert.lora.config import unfaithful

FIELDS = frozenset({"gate_share_size", "kron_share_size", "r_inter", "r_intra", "r_local", "share_mode"})
INHERITED = ("auto_mapping", "base_model_name_or_path", "revision", "task_type")


def read_mode(config: Mapping[str, Any], path: Path) -> str:
    """The share mode of a configuration that can be converted.

    :raises InputError: when it is not one of the authors' configurations.
    :raises Refused: for an unknown share mode or a setting that changes what the tensors mean.
    """
    if config.get("peft_type") != OFFICIAL_TYPE:
        raise InputError(f"{path}: peft_type is {config.get('peft_type')!r}, {OFFICIAL_TYPE!r} is expected")
    mode = config.get("share_mode")
    if not isinstance(mode, str) or mode not in MODES:
        raise Refused(f"{path}: share_mode is {mode!r}; the authors' code knows {', '.join(MODES)} and trains no other")
    reasons = unfaithful(config, FIELDS)
    if reasons:
        raise Refused(f"{path}: " + "; ".join(reasons))
    return mode


def check_plan(config: Mapping[str, Any], path: Path, plan: OfficialPlan) -> None:
    """Compares ranks and sizes of the tensors with what the configuration says of them, where it does.

    :raises InputError: naming the field.
    """
    for field, found in plan.settings().items():
        said = config.get(field)
        if said is not None and said != found:
            raise InputError(
                f"{path}: {field} is {said!r} but the tensors have {found}; one of the two files is another adapter's"
            )


def official_config(plan: OfficialPlan, source: Mapping[str, Any], targets: list[str]) -> dict[str, Any]:
    """Every field that the authors' code writes.

    source: PEFT fields to take over (`INHERITED`), those that are set.
    """
    return dict(
        sorted(
            {
                "bias": "none",
                "fan_in_fan_out": False,
                "gate_share_size": GATE_SIZE,
                "inference_mode": True,
                "init_lora_weights": True,
                "kron_share_size": KRON_SIZE,
                "layer_replication": None,
                "lora_alpha": None,  # without effect on the authors' code
                "lora_dropout": 0.0,  # their default, null, makes their code raise
                "modules_to_save": None,
                "peft_type": OFFICIAL_TYPE,
                "share_mode": plan.mode,
                "target_modules": targets,
                **{field: source.get(field) for field in INHERITED},
                **plan.settings(),
            }.items()
        )
    )
