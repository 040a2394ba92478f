"""What the authors' layout says before there are numbers: its keys, its shapes, its scaling.

`adapter_model.safetensors`, keys below `base_model.model.<module>.`, one copy of the shared tensors under every module:

    sharelora_lora_A.local.weight   (r_local, in)      sharelora_lora_B.local.weight   (out, r_local)
    sharelora_lora_A.intra.weight   (r_intra, s_in)    sharelora_lora_B.intra.weight   (s_out, r_intra)    equal within a layer
    sharelora_lora_A.inter.weight   (r_inter, s_in)    sharelora_lora_B.inter.weight   (s_out, r_inter)    equal everywhere
    sharelora_sampler.{intra,inter}_sampler_{A,B}.weight                 kron: kernels (1, in/s), (out/s, 1)
    sharelora_gate.{intra,inter}_{input,output}_gate_{down,up}.weight    gate: (1, in), (s, 1), (1, s), (out, 1)

The authors' code multiplies all three paths by the constant 2 and never by lora_alpha / r. Our form holds no scaling, so the 2
is folded into the local B and into the shared B's.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from bslora_convert.bslora.form import LEVELS, PARTS
from bslora_convert.bslora.transforms import Gate, Kronecker, Slice, Transform
from bslora_convert.lora.keys import PREFIX
from bslora_convert.modules.factors import Shape
from bslora_convert.modules.names import kind_of, layer_of

OFFICIAL_TYPE = "SHARELORA"
SCALING = 2.0
MODES = {"slice": "ss", "gate": "gt", "kron": "ke"}
EVERYONE = "all"  # the inter group's name

KEY = re.compile(
    r"^(?P<module>.+)\.sharelora_(?P<box>lora_A|lora_B|sampler|gate)\.((?P<adapter>[^.]+)\.)?(?P<name>\w+)\.weight$"
)
# The authors' code takes the third of exactly five parts for the number of the layer.
MODULE = re.compile(r"^model\.layers\.(0|[1-9][0-9]{0,5})\.[^.]+\.[^.]+$")

# What a module keeps of its own: our name -> theirs, by transform.
OWN = {
    "ss": {},
    "gt": {
        f"{side}_{way}": f"gate.{{level}}_{side}_gate_{way}" for side in ("input", "output") for way in ("down", "up")
    },
    "ke": {side: f"sampler.{{level}}_sampler_{side}" for side in "AB"},
}


@dataclass(frozen=True, slots=True)
class OfficialPlan:
    """The transform of an adapter and the rank of each of its three paths, the same for every module."""

    transform: Transform
    ranks: Mapping[str, int]

    @property
    def mode(self) -> str:
        """The authors' word for the transform: `share_mode`."""
        return next(mode for mode, name in MODES.items() if name == self.transform.name)

    def own(self, level: str) -> dict[str, str]:
        """The authors' names of a module's kernels or gates of one level, by ours."""
        return {ours: theirs.format(level=level) for ours, theirs in OWN[self.transform.name].items()}

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        """Every tensor that stands under a module of `shape`, by the authors' name."""
        shapes: dict[str, Shape] = {}
        for part in PARTS:
            rows, columns = shape if part == "local" else self.transform.pair_sizes
            shapes |= {f"lora_A.{part}": (self.ranks[part], columns), f"lora_B.{part}": (rows, self.ranks[part])}
        for level in LEVELS:
            own = self.transform.own_shapes(shape, 1)
            shapes |= {theirs: own[ours] for ours, theirs in self.own(level).items()}
        return shapes

    def settings(self) -> dict[str, int]:
        """The fields of the configuration that say the same; only kron and gate have a size."""
        sizes = {
            f"{mode}_share_size": self.transform.size
            for mode, kind in (("kron", Kronecker), ("gate", Gate))
            if isinstance(self.transform, kind)
        }
        return {f"r_{part}": self.ranks[part] for part in PARTS} | sizes


def key_of(module: str, name: str) -> str:
    """A tensor's key in the file."""
    return f"{PREFIX}{module}.sharelora_{name}.weight"


def group_of(level: str, module: str) -> str:
    """The group whose pair a module uses: its layer's, or everyone's.

    module: a name that `MODULE` matches.
    """
    return (layer_of(module) or "") if level == "intra" else EVERYONE


def fits(transform: Transform, shape: Shape) -> str | None:
    """Why the authors' code can't apply a transform to a module of `shape`; None where it can."""
    out, width = shape
    if isinstance(transform, Slice) and (out > transform.size_out or width > transform.size_in):
        size = f"{transform.size_out}×{transform.size_in}"
        return f"a module of {out}×{width} is larger than the shared {size} it would be cut from"
    if isinstance(transform, Kronecker) and not transform.divides(shape):
        return f"the shared size {transform.size} does not divide both sides of a module of {out}×{width}"
    return None


def target_modules(names: Collection[str]) -> list[str]:
    """Last parts of the names where they stand for exactly these modules in the layers from 0 on, else the names themselves."""
    layers = {layer_of(name) for name in names}
    complete = layers == {f"model.layers.{number}" for number in range(len(layers))}
    if complete and len(names) == len(layers) * len({kind_of(name) for name in names}):
        return sorted({name.rpartition(".")[2] for name in names})
    return list(names)
