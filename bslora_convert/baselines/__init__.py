"""The other forms that an adapter can take, each a least-squares fit: what BSLoRA is compared with."""

from collections.abc import Mapping

from bslora_convert.baselines.baseline import Fitted, Fitter, OutOfReach
from bslora_convert.baselines.loraquant import LORAQUANT, LORAQUANT_INITIAL
from bslora_convert.baselines.prolora import fit_prolora
from bslora_convert.baselines.quantised import TRUNCATED, TRUNCATED_INITIAL, WHOLE, WHOLE_INITIAL
from bslora_convert.baselines.sharelora import sharelora_a, sharelora_a_qkv, sharelora_ab, sharelora_b
from bslora_convert.baselines.tied_lora import tied_lora_tl5, tied_lora_tl6
from bslora_convert.baselines.truncated import svd_adaptive, svd_uniform
from bslora_convert.baselines.vb_lora import fit_vb_lora
from bslora_convert.baselines.vera import fit_vera

__all__ = [
    "BASELINES",
    "QUANTISED",
    "QUANTISED_INITIAL",
    "WHOLE",
    "WHOLE_INITIAL",
    "Fitted",
    "Fitter",
    "OutOfReach",
]

BASELINES: Mapping[str, Fitter] = {
    "svd_uniform": svd_uniform,
    "svd_adaptive": svd_adaptive,
    "sharelora_a": sharelora_a,
    "sharelora_b": sharelora_b,
    "sharelora_ab": sharelora_ab,
    "sharelora_a_qkv": sharelora_a_qkv,
    "tied_lora_tl5": tied_lora_tl5,
    "tied_lora_tl6": tied_lora_tl6,
    "vera": fit_vera,
    "vb_lora": fit_vb_lora,
    "prolora": fit_prolora,
}

QUANTISED: Mapping[str, Fitter] = {**TRUNCATED, **LORAQUANT}

QUANTISED_INITIAL: Mapping[str, Fitter] = {
    **TRUNCATED_INITIAL,
    **LORAQUANT_INITIAL,
}  # with A's random initialisation known
