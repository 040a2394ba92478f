"""report.html: one self-contained page, the answer in its first screen."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from bslora_convert.modules.names import kind_of, layer_of
from bslora_convert.report import commands, plots, verdict
from bslora_convert.report.environment import environment
from bslora_convert.report.labels import short_layers
from bslora_convert.report.plots import Picture
from bslora_convert.results.adapter import Fidelity, ModuleRecord

MANY = 12  # kinds that have a line each in the plot of spectra


def render(
    record: Fidelity,
    spectra: Mapping[str, Tensor],
    log: Sequence[Mapping[str, Any]] = (),
    base_model: str | None = None,
) -> str:
    """The page of one conversion.

    spectra: σ² of every module of the source. log: the steps of a training. base_model: what the adapter is for, if it says.
    """
    modules = record.weight.modules
    kinds = {module.name: kind_of(module.name) for module in modules}
    grid = _grid({module.name: module.relative_error for module in modules}, kinds)
    figures = {
        "beside plain SVD of the same size": plots.baselines(_errors(record)),
        "spectra of the source": plots.spectra(*_spectra(modules, spectra, _few(kinds))),
    }
    if record.compact.transform != "none":
        figures["where the numbers go"] = plots.budget_split(
            record.compact.parameters_by_part, record.weight.components
        )
    if record.coding is not None:
        figures["where the bits go"] = plots.widths(record.coding.widths_by_part)
    improved = []
    if record.evidence:
        improved += verdict.evidence(record.evidence)
    if record.training is not None:
        improved += verdict.trained(record.training)
    if record.training is not None and log:
        start = (0, record.training.heldout_kl_before)
        heldout = [start, *((row["step"], row["heldout_kl"]) for row in log if "heldout_kl" in row)]
        figures["distillation"] = plots.training([row["step"] for row in log], [row["loss"] for row in log], heldout)
    urgent, notes = verdict.attention(record.notes)
    return (
        environment()
        .get_template("report.html")
        .render(
            record=record,
            verdict=verdict.sentences(record),
            svd_error=verdict.rival_error(record),
            urgent=urgent,
            notes=notes,
            improved=improved,
            command=commands.verify("THIS_DIR", record.recipe.get("base_model") or base_model or commands.UNKNOWN_BASE),
            figures={
                "error by module: the stronger the red, the more is lost": plots.picture(
                    lambda width: plots.error_map(*grid, width)
                ),
                **_moved(record, kinds),
                **{title: Picture(plots.data_uri(figure)) for title, figure in figures.items()},
            },
            worst=sorted(modules, key=lambda module: -module.relative_error)[:12],
        )
    )


def _moved(record: Fidelity, kinds: Mapping[str, str]) -> dict[str, Picture]:
    """How far training moved each A from its random initialisation, where that is known."""
    if record.initialisation is None:
        return {}
    grid = _grid(record.initialisation.changed_by_module, kinds)
    picture = plots.picture(lambda width: plots.change_map(*grid, width))
    return {"how far training moved A from its random initialisation": picture}


def _grid(
    values: Mapping[str, float], kinds: Mapping[str, str]
) -> tuple[dict[tuple[str, str], float], list[str], list[str]]:
    """Values of modules by layer and kind, with all layers and kinds. kinds: of all modules."""
    shown = short_layers([layer_of(name) for name in kinds])
    found = {(layer, kinds[n]): values[n] for layer, n in zip(shown, kinds, strict=True) if n in values}
    return found, list(dict.fromkeys(shown)), list(dict.fromkeys(kinds.values()))


def _few(kinds: Mapping[str, str]) -> dict[str, str]:
    """Kinds without the numbers of experts; where many are left, their last parts."""
    merged = {name: re.sub(r"\.\d+(?=\.|$)", ".*", kind) for name, kind in kinds.items()}
    if len(set(merged.values())) <= MANY:
        return merged
    return {name: kind.rpartition(".")[2] for name, kind in merged.items()}


def _errors(record: Fidelity) -> dict[str, float]:
    transform = record.compact.transform
    return {
        "this result" if transform == "none" else f"this result ({transform})": record.weight.relative_error,
        "SVD, a rank per module": verdict.rival_error(record),
        "SVD, one rank": verdict.rival_error(record, "svd_uniform"),
    }


def _spectra(
    modules: Sequence[ModuleRecord], spectra: Mapping[str, Tensor], kinds: Mapping[str, str]
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Median share of energy left out after k components and mean local rank, by kind."""
    longest = max(len(values) for values in spectra.values())
    left: dict[str, list[np.ndarray]] = {}
    ranks: dict[str, list[int]] = {}
    for module in modules:
        values = spectra[module.name].cpu().numpy()
        energy = values.sum()
        if energy == 0:
            continue
        tail = np.zeros(longest + 1)
        tail[: len(values)] = values[::-1].cumsum()[::-1] / energy
        left.setdefault(kinds[module.name], []).append(tail)
        ranks.setdefault(kinds[module.name], []).append(module.local_rank)
    return (
        {kind: np.median(tails, axis=0) for kind, tails in left.items()},
        {kind: float(np.mean(values)) for kind, values in ranks.items()},
    )
