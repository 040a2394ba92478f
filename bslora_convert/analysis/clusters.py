"""Who could share with whom: layers and modules clustered by the blocks that a Kronecker pair would have to explain.

    signature   G = Σ_j ΔW_jᵀ ΔW_j over the column blocks j of size s     (s, s), from factors: Σ_j A_jᵀ (BᵀB) A_j
                and the same for the rows, Σ_i (ΔW_i)(ΔW_i)ᵀ; each without its mean diagonal and of length one
    similarity  mean of ⟨G₁, G₂⟩ over both sides: 1 for the same blocks, about 0 for unrelated ones, defined for any two shapes
    distance    1 − similarity; a layer's signature is the sum of its modules'

Agglomerative clustering with average linkage; the number of clusters is that of the highest silhouette. Where even that is below
`LEAST_SILHOUETTE`, everything is one cluster.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bslora_convert.bslora.transforms import Kronecker
from bslora_convert.fit.parallel import each
from bslora_convert.fit.source import Source
from bslora_convert.modules.lowrank import gram
from bslora_convert.modules.names import natural_order

LEAST_SILHOUETTE = 0.25
MOST_CLUSTERS = 12


@dataclass(frozen=True, slots=True)
class Clusters:
    """Names by cluster, in order, and how well they separate (-1 to 1; 0 for a single cluster)."""

    members: tuple[tuple[str, ...], ...]
    silhouette: float


def signatures(source: Source, transform: Kronecker) -> dict[str, Tensor]:
    """Each sharing module's block Gram matrices of columns and rows, not yet centred: (2, s, s) float64."""

    def signature(name: str) -> Tensor:
        factors = source.deltas[name].factors()
        inputs = _blocks(transform, factors.a.T, source.grams[name].b)
        outputs = _blocks(transform, factors.b, source.grams[name].a)
        return torch.stack([inputs, outputs])

    return dict(zip(source.sharing, each(signature, source.sharing), strict=True))


def _blocks(transform: Kronecker, side: Tensor, inner: Tensor) -> Tensor:
    """Σ_j X_j inner X_jᵀ over the blocks X_j (s, r) of side (length, r), inner (r, r): (s, s)."""
    blocks = transform.blocks(side, -(-side.shape[0] // transform.size)).double()  # (grid, s, r)
    flat = blocks.permute(1, 0, 2).flatten(1)
    weighted = (blocks @ inner.to(blocks)).permute(1, 0, 2).flatten(1)
    return weighted @ flat.T


def similarities(signatures: Sequence[Tensor]) -> Tensor:
    """Similarity of every pair: (n, n), from signatures (2, s, s)."""
    size = signatures[0].shape[-1]
    identity = torch.eye(size, dtype=torch.float64)
    rows = []
    for signature in signatures:
        mean = signature.diagonal(dim1=1, dim2=2).mean(1)
        flat = (signature.cpu() - mean[:, None, None].cpu() * identity).flatten(1)
        rows.append(flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-300))
    stacked = torch.stack(rows)  # (n, 2, s·s)
    return torch.stack([gram(stacked[:, side].T) for side in (0, 1)]).mean(0)


def clusters(names: Sequence[str], similarity: Tensor) -> Clusters:
    """Names grouped by similarity (n, n)."""
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import silhouette_score

    whole = Clusters((tuple(names),), 0.0)
    distance = (1 - similarity).clamp_min(0).fill_diagonal_(0).numpy()
    best = whole
    for count in range(2, min(MOST_CLUSTERS, len(names) - 1) + 1):
        labels = AgglomerativeClustering(count, metric="precomputed", linkage="average").fit_predict(distance)
        score = float(silhouette_score(distance, labels, metric="precomputed"))
        if score > best.silhouette:
            found = {
                int(label): [n for n, mine in zip(names, labels, strict=True) if mine == label] for label in labels
            }
            best = Clusters(tuple(tuple(members) for members in found.values()), score)
    return best if best.silhouette >= LEAST_SILHOUETTE else whole


def layer_signatures(source: Source, modules: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sum over each numbered layer, layers in order."""
    layers = source.groups["intra"]
    return {
        layer: torch.stack([modules[name] for name in layers[layer]]).sum(0)
        for layer in sorted(layers, key=natural_order)
    }


def clustered(source: Source) -> dict[str, tuple[Tensor, Clusters]]:
    """Similarity (n, n) and clusters of the `layers`, in order, and of the `modules` that may share."""
    own = signatures(source, Kronecker.dividing([source.shapes[name] for name in source.sharing]))
    found = {}
    for title, signed in (("layers", layer_signatures(source, own)), ("modules", own)):
        similarity = similarities(list(signed.values()))
        found[title] = similarity, clusters(list(signed), similarity)
    return found


def partitions(source: Source) -> dict[str, dict[str, list[str]]]:
    """Groupings that the clusters suggest, by name; none where nothing separates.

    Clusters of layers, and clusters of single modules; a module that stands alone is in no group.
    """
    if not source.sharing:
        return {}
    by = {title: found for title, (_, found) in clustered(source).items()}
    found = {}
    if len(by["layers"].members) > 1:
        found["clusters of layers"] = groups_of_layers(source, by["layers"])
    if len(by["modules"].members) > 1:
        several = [list(members) for members in by["modules"].members if len(members) > 1]
        found["clusters of modules"] = {f"modules-{number}": members for number, members in enumerate(several)}
    return found


def groups_of_layers(source: Source, found: Clusters) -> dict[str, list[str]]:
    """Sharing group -> its modules, where each cluster of layers is one."""
    layers = source.groups["intra"]
    return {
        f"layers-{number}": [name for layer in members for name in layers[layer]]
        for number, members in enumerate(found.members)
    }
