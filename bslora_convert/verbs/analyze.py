"""`analyze`: every measure of one adapter, gathered, described in plain words and drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bslora_convert.analysis import entropy, ranks, recommendation, sharing, subspaces
from bslora_convert.analysis.clusters import clustered
from bslora_convert.behaviour.prompts import Prompts
from bslora_convert.conversion.sizes import sizes
from bslora_convert.extras import need
from bslora_convert.files.address import resolve
from bslora_convert.files.hashing import sha256
from bslora_convert.files.landing import check_apart, check_output, landing
from bslora_convert.files.record import ANALYSIS_NAME, seal
from bslora_convert.files.store import as_written
from bslora_convert.fit.convert import Source, measure
from bslora_convert.fit.parallel import modules_over_cores
from bslora_convert.fit.source import check_magnitude
from bslora_convert.lora import LoraAdapter, load_lora
from bslora_convert.modules.names import kind_of, natural_order
from bslora_convert.process.progress import Progress, silent
from bslora_convert.recipe.analyzing import AnalyzeOptions
from bslora_convert.recipe.options import built
from bslora_convert.results.analysis import Analysis
from bslora_convert.version import __version__

SCHEMA_VERSION = 1
PARALLEL = 0.9  # cosine of two stored A from which they are taken for the same start


def analyze(
    lora: str | Path,
    out: str | Path | None = None,
    options: AnalyzeOptions | None = None,
    *,
    progress: Progress = silent,
    **fields: Any,
) -> Analysis:
    """Measures what a LoRA's modules and layers have in common, and returns what `analysis.json` holds.

    out: a directory for `analysis.json`, `analysis.html` and the plots; nothing is written without it.
    options, or fields of `AnalyzeOptions`: with base_model and prompts, the entropy similarity of what the modules put out on
    these prompts too.

    :raises InputError: when something is missing or damaged. :raises Refused: when the adapter can't be read faithfully.
    :raises RecipeError: for an option that is not allowed. :raises OutputError: when `out` can't be used.
    """
    asked = built(AnalyzeOptions, options, fields)
    need("analysis", "analyze")
    if out is not None:
        check_output(Path(out), asked.overwrite, resolve(lora))
    rows = Prompts.read(asked.prompts, asked.limit) if asked.prompts is not None else None
    progress("reading")
    adapter = load_lora(lora, **asked.arguments)
    if out is not None:
        check_apart(adapter.weights, Path(out))  # it may stand in a sub-folder
    others = {str(path): load_lora(path) for path in asked.beside}
    with modules_over_cores():
        source = measure(adapter.modules, adapter.kinds)
        check_magnitude(source, adapter.weights)
        measured = _measured(adapter, others, source, asked, progress)
    activations = None
    if rows is not None:
        from bslora_convert.behaviour.activations import activation_pools
        from bslora_convert.behaviour.adapter import Adapter
        from bslora_convert.behaviour.session import BaseModelSession

        reference = Adapter.of_lora(adapter, Path(lora), measured["source"]["sha256"])
        with BaseModelSession(reference, str(asked.base_model), asked.device, "auto", progress) as session:
            pools = activation_pools(session, rows)
        activations = {"rows": len(rows.rows), **_rmi(source, pools)}
    record = Analysis(**measured, activations=activations, sizes=sizes(source, adapter, Path(lora)), recommendation=[])
    record = replace(record, recommendation=recommendation.sentences(record))
    if out is not None:
        from bslora_convert.report.analysis import write

        with landing(Path(out), asked.overwrite) as place:
            write(place, record)
            record = replace(record, files=seal(place, ANALYSIS_NAME, record.to_dict()))
    return record


def _measured(
    adapter: LoraAdapter, others: Mapping[str, LoraAdapter], source: Source, asked: AnalyzeOptions, progress: Progress
) -> dict[str, Any]:
    pools = {name: entropy.pool(delta, source.grams[name]) for name, delta in source.deltas.items()}
    progress("comparing subspaces")
    spaces = {name: subspaces.Spaces.of(delta.factors()) for name, delta in source.deltas.items()}
    within, across = _subspaces(source, spaces)
    sharable = bool(source.sharing) and source.energy > 0
    return {
        "schema_version": SCHEMA_VERSION,
        "tool_version": __version__,
        "source": {
            "path": as_written(adapter.path),
            "sha256": sha256(adapter.weights),
            "parameters": source.parameters,
            "modules": len(source.deltas),
            "layers": len(source.groups["intra"]),
        },
        "modules": [
            {"name": name, "shape": list(source.shapes[name]), **ranks.of_module(source.spectra[name], delta.rank),
             "spectrum": source.spectra[name].sqrt().tolist()}
            for name, delta in source.deltas.items()
        ],
        "ranks": ranks.of_adapter(source),
        **_rmi(source, pools),
        "subspaces_within": within,
        "subspaces_across": across,
        "shared_energy": sharing.shared_energy(source, asked.draws, asked.seed, progress) if sharable else {},
        "draws": asked.draws,
        "shared_initialisation": _starts(adapter, others),
        "groups": _groups(source) if sharable else {},
    }  # fmt: skip


def _rmi(source: Source, pools: Mapping[str, entropy.Pool]) -> dict[str, Any]:
    """Entropy similarity of the kinds within each layer, and of the layers."""
    layers = {layer: source.groups["intra"][layer] for layer in _ordered(source)}
    whole = [entropy.merged(pools, members) for members in layers.values()]
    return {
        "rmi_within": {
            layer: {
                "kinds": [kind_of(name) for name in members],
                "matrix": entropy.rmi_matrix([pools[name] for name in members]),
            }
            for layer, members in layers.items()
        },
        "rmi_across": {"layers": list(layers), "matrix": entropy.rmi_matrix(whole)},
    }


def _subspaces(
    source: Source, spaces: Mapping[str, subspaces.Spaces]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Means over all pairs of modules: of one layer (by side), and of one kind in two layers (by kind and side)."""
    within: dict[str, list[subspaces.Pairs]] = {side: [] for side in subspaces.SIDES}
    for members in source.groups["intra"].values():
        for side, dimension in zip(subspaces.SIDES, (0, 1), strict=True):
            sizes: dict[int, list[str]] = {}
            for name in members:
                sizes.setdefault(source.shapes[name][dimension], []).append(name)
            within[side] += [
                subspaces.pairs([spaces[n] for n in same], side) for same in sizes.values() if len(same) > 1
            ]
    kinds: dict[tuple[str, tuple[int, int]], list[str]] = {}
    for name in source.sharing:
        kinds.setdefault((kind_of(name), source.shapes[name]), []).append(name)
    across = [
        {"kind": kind, "side": side, **_means([subspaces.pairs([spaces[name] for name in members], side)])}
        for (kind, _), members in kinds.items()
        if len(members) > 1
        for side in subspaces.SIDES
    ]
    return [{"side": side, **_means(found)} for side, found in within.items() if found], across


def _means(found: Sequence[subspaces.Pairs]) -> dict[str, float]:
    """Means over the pairs of every group."""
    counts = [len(pairs.cka) * (len(pairs.cka) - 1) for pairs in found]
    return {
        "pairs": sum(counts) // 2,
        **{
            measure: sum(
                count * subspaces.off_diagonal_mean(getattr(pairs, measure))
                for count, pairs in zip(counts, found, strict=True)
            )
            / sum(counts)
            for measure in ("overlap", "z", "cka")
        },
    }


def _starts(adapter: LoraAdapter, others: Mapping[str, LoraAdapter]) -> dict[str, Any]:
    """Pairs of modules, here and in other adapters, whose A are nearly parallel."""
    own = {name: module.a for name, module in adapter.modules.items()}
    found = {
        path: [
            {"module": name, "cosine": cosine}
            for name, a in own.items()
            if name in other.modules
            and other.modules[name].a.shape == a.shape
            and abs(cosine := subspaces.cosine(a, other.modules[name].a)) >= PARALLEL
        ]
        for path, other in others.items()
    }
    return {"within": subspaces.shared_initialisation(own, PARALLEL), "across_adapters": found}


def _groups(source: Source) -> dict[str, Any]:
    """Clusters of layers and of modules."""
    found = clustered(source)
    result = {
        title: {
            "clusters": [list(members) for members in clusters.members],
            "silhouette": clusters.silhouette,
            "mean_similarity": subspaces.off_diagonal_mean(similarity),
        }
        for title, (similarity, clusters) in found.items()
    }
    result["layers"] |= {"names": _ordered(source), "similarity": found["layers"][0].tolist()}
    return result


def _ordered(source: Source) -> list[str]:
    return sorted(source.groups["intra"], key=natural_order)
