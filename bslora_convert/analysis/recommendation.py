"""What the measures mean for someone who has to choose, in plain sentences."""

from collections.abc import Mapping
from typing import Any

from bslora_convert.analysis.sharing import most_above_chance

CONVINCING = 3.0  # z-score from which a shared factor explains more than chance
WORTH = 0.02  # share of the energy above chance from which sharing is likely to earn its numbers


def sentences(record: Mapping[str, Any]) -> list[str]:
    """The recommendation of an analysis record."""
    said = [_rank(record), _precision(record)]
    if not record["shared_energy"]:
        return [*said, "No two modules stand in numbered layers, so there is nothing to share."]
    found = most_above_chance(record["shared_energy"], CONVINCING)
    if found is None:
        said.append(
            "No shared factor explains more than random subspaces of the same spectra would give: sharing will not pay, "
            "and the default, --transform auto, will not try it for long."
        )
    else:
        transform, level, row = found
        gain = row["energy"] - row["null_mean"]
        where = "within layers" if level == "intra" else "across layers"
        said.append(
            f"The shared factor that explains most above chance ({transform}, rank {row['rank']}, "
            f"{where}) explains {row['energy']:.2%} of the energy, {gain:.2%} above chance (z = {row['z']:.1f})."
        )
        said.append(
            f"That may earn its numbers: compare --transform {transform} with --transform none at your size (`compare`)."
            if gain >= WORTH
            else "That is real and small: --transform auto keeps it only where it pays, --transform none is as good."
        )
    layers = record["groups"]["layers"]
    if len(layers["clusters"]) > 1:
        said.append(
            f"The layers fall into {len(layers['clusters'])} groups (silhouette {layers['silhouette']:.2f}): "
            'try `groups = "auto"` in a recipe file.'
        )
    tied = record["shared_initialisation"]
    if tied["within"] or any(tied["across_adapters"].values()):
        count = len(tied["within"]) + sum(map(len, tied["across_adapters"].values()))
        said.append(
            f"{count} pairs of A are nearly parallel: they began at the same start or were tied, and could be stored once."
        )
    return said


def _precision(record: Mapping[str, Any]) -> str:
    """What coarser numbers save, beside what sharing may save."""
    by_error = {row["value"]: row["byte_ratio"] for row in record["sizes"] if row["option"] == "--max-error"}
    return (
        f"Precision saves most: in codes, rank and bits chosen together, an error of 0.1 (99 % of the energy) takes about "
        f"{by_error[0.1]:.1%} of the bytes and one of 0.2 (96 %) {by_error[0.2]:.1%}."
    )


def _rank(record: Mapping[str, Any]) -> str:
    shares = record["ranks"]
    return (
        f"95 % of the energy fits in {shares['0.95']['parameter_ratio']:.1%} of the parameters with a rank for each module "
        f"(90 %: {shares['0.9']['parameter_ratio']:.1%}, 99 %: {shares['0.99']['parameter_ratio']:.1%}); a module needs rank "
        f"{shares['0.95']['median_module_rank']} in the median, {shares['0.95']['largest_module_rank']} at most."
    )
