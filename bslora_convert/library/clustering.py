"""Who goes on which bases: adapters converted separately, clustered by what their updates have in common, and what they save.

    joined      to bases that are there already, the ones that save an adapter most
    clustered   by similarity, the mean over modules of the larger linear CKA of column and row spaces (`analysis.subspaces`)
    fitted      bases for each module of a cluster (`fit.joint`), kept where they and the cores take fewer bytes than the factors
                that they replace; an adapter stays where it saves more than what its files say about bases

Nothing is written here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bslora_convert.analysis.clusters import clusters
from bslora_convert.analysis.subspaces import SIDES, Spaces, pairs
from bslora_convert.bslora import bases
from bslora_convert.bslora.bases import Basis
from bslora_convert.bslora.form import LEVELS
from bslora_convert.bslora.storage import CompactAdapter
from bslora_convert.errors import InputError
from bslora_convert.fit.joint import Target, shared_basis, take
from bslora_convert.fit.parallel import each
from bslora_convert.library.jobs import Result
from bslora_convert.lora import LoraAdapter
from bslora_convert.modules.factors import Factors, add
from bslora_convert.modules.names import natural_order

LEAST_SIMILARITY = 0.25  # to the nearest other adapter; below it an adapter stands alone
ADAPTER_BYTES = 1024  # what an adapter's files say about the bases that it uses
BASIS_BYTES = 512  # a module's entries in the header of a file of bases


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter as it was converted separately, and what it came from."""

    row: Result
    source: LoraAdapter
    compact: CompactAdapter
    record: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        """Modules that have a local part."""
        return [name for name, module in self.compact.form.modules.items() if module.local.rank]

    def target(self, name: str) -> Target:
        """What a module's local part stands for: ΔW without what the other parts give, in float64."""
        delta, form = self.source.modules[name], self.compact.form
        whole = Factors(delta.b.double() * delta.scaling, delta.a.double())
        others = [part for level in LEVELS if (part := form.part(name, level)) is not None]
        rest = add(whole, *(Factors(-part.b.double(), part.a.double()) for part in others))
        return Target.of(rest, form.modules[name].local)

    def core(self, name: str, basis: Basis) -> tuple[torch.Tensor, Factors] | None:
        """The core in a module's basis and the local part, None where the adapter keeps its own factors."""
        if name not in self.names or not basis.fits(self.compact.form.modules[name].shape, self.compact.dtype):
            return None
        return take(self.target(name), basis)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Who goes on which bases; file: of bases that are there already, None for new ones."""

    members: tuple[Member, ...]
    bases: Mapping[str, Basis]
    file: str | None = None


def join(member: Member, known: Sequence[str], out: Path) -> Cluster | None:
    """The bases already there that save an adapter most, None where none does."""
    best: Cluster | None = None
    most = ADAPTER_BYTES
    for file in known:
        try:
            found = bases.read(bases.find(out / member.row.id, file))
        except InputError:  # taken away or changed: whoever needs it says so when it is read
            continue
        gain = sum(_gains([member], name, basis)[0] for name, basis in found.items())
        if gain > most:
            best, most = Cluster((member,), found, file), gain
    return best


def clustered(members: Sequence[Member]) -> list[list[Member]]:
    """Adapters whose updates have something in common, each adapter in one cluster at most."""
    if len(members) < 2:
        return []
    names = list(members[0].compact.form.modules)

    def similarity(name: str) -> torch.Tensor:
        """NaN where one of a pair does nothing to the module."""
        spaces = [Spaces.of(member.target(name).factors) for member in members]
        does = [i for i, one in enumerate(spaces) if len(one.singular)]
        found = torch.full((len(members),) * 2, torch.nan, dtype=torch.float64)
        if does:
            cka = torch.stack([pairs([spaces[i] for i in does], side).cka for side in SIDES]).amax(0)
            found[torch.tensor(does)[:, None], torch.tensor(does)] = cka
        return found

    total = torch.stack(list(each(similarity, names))).nanmean(0).nan_to_num(0.0)
    nearest = total.clone().fill_diagonal_(0).amax(0)
    near = [i for i in range(len(members)) if float(nearest[i]) >= LEAST_SIMILARITY]
    if len(near) < 2:
        return []
    found = clusters([str(i) for i in near], total[near][:, near])
    return [[members[int(i)] for i in names] for names in found.members if len(names) > 1]


def fit_cluster(members: Sequence[Member]) -> Cluster | None:
    """Bases for a cluster, and who of it goes on them; None where nothing is saved."""
    dtype = members[0].compact.dtype
    names = sorted({name for member in members for name in member.names}, key=natural_order)

    def fit(name: str) -> tuple[Basis | None, list[int]]:
        basis = shared_basis([member.target(name) for member in members if name in member.names], dtype)
        return basis, _gains(members, name, basis) if basis is not None else []

    fitted = dict(zip(names, each(fit, names), strict=True))
    found = {name: basis for name, (basis, _) in fitted.items() if basis is not None}
    gains = {name: fitted[name][1] for name in found}
    staying = set(range(len(members)))
    while True:
        here = {i for i in staying if sum(gains[name][i] for name in found) > ADAPTER_BYTES}
        worth = {
            name: basis
            for name, basis in found.items()
            if sum(gains[name][i] for i in here) > basis.parameters * dtype.itemsize + BASIS_BYTES
        }
        if here == staying and len(worth) == len(found):
            break
        staying, found = here, worth
    return Cluster(tuple(members[i] for i in sorted(staying)), found) if found else None


def _gains(members: Sequence[Member], name: str, basis: Basis) -> list[int]:
    """Bytes that each adapter's own file loses when a module goes on a basis; 0 for those that keep their own factors."""
    gains = []
    for member in members:
        taken = member.core(name, basis)
        if taken is None:
            gains.append(0)
        else:
            core, _ = taken
            gains.append((member.compact.form.modules[name].local.parameters - core.numel()) * core.element_size())
    return gains
