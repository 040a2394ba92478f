"""A BSLoRA that is to be trained: which modules of a model it adapts, who shares with whom, and the ranks.

Targets are found by PEFT's own rule. Modules of numbered layers share: within their layer, or in other groups, on the intra
level, all of them on the inter level. A rank of zero leaves its part out, so that `(2, 4, 0)` shares within layers only.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn

from bslora_convert.bslora.layout import Entry, Group, Layout
from bslora_convert.bslora.transforms import Gate, Kronecker, Slice, Transform
from bslora_convert.bslora.transforms.gate import DEFAULT_SIZE
from bslora_convert.bslora.transforms.kronecker import split_rank
from bslora_convert.conversion.groups import Grouping, match, read_groups
from bslora_convert.errors import InputError, RecipeError
from bslora_convert.fit.source import ENTIRE
from bslora_convert.layers.shapes import layer_shape
from bslora_convert.lora.targets import target_fields
from bslora_convert.modules.names import kind_of, layer_of, natural_order
from bslora_convert.recipe.checks import check_choice, check_whole
from bslora_convert.recipe.structure import LARGEST_RANK, Structure
from bslora_convert.recipe.target import RankTriple

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")  # the paper's
SCALING = 2.0  # of every part: what the authors' code multiplies by, whatever lora_alpha says
DEFAULT_RANKS: RankTriple = (2, 4, 16)

# The triples that the paper's tables were made with, by base model. `paper` is what its text says for all of them, but the
# parameters that it prints are those of other triples for ke on Llama-1-7B and for ss and gt on the other two. What it prints
# for ke on those comes from no triple known; the ones here are what its text or the released code says.
PRESETS: dict[str, dict[str, RankTriple]] = {
    "paper": {"ss": (2, 4, 32), "gt": (2, 8, 16), "ke": (2, 4, 16)},
    "released-code": {"ss": (2, 4, 8), "gt": (2, 4, 8), "ke": (2, 4, 8)},
    "llama-1-7b": {"ss": (2, 4, 32), "gt": (2, 8, 16), "ke": (2, 8, 16)},
    "llama-3-8b": {"ss": (2, 4, 16), "gt": (2, 4, 16), "ke": (2, 8, 32)},
    "llama-1-13b": {"ss": (2, 4, 8), "gt": (2, 4, 8), "ke": (2, 8, 16)},
}
TRANSFORM_NAMES = ("ke", "gt", "ss", "none")
GROUPS = ("layer", "kind")


@dataclass(frozen=True, slots=True)
class Fresh:
    """The form of an adapter before there is a model.

    transform: `ke`, `gt`, `ss` or `none`, with local parts only. ranks: local, intra, inter, or the name of a preset.
    shared_size: of ke (the largest up to 256 that divides every side) and gt (1024). kernel: of ke. slice: where ss has windows.
    groups: who shares on the intra level: `layer`, `kind` (the same module of every layer), patterns of modules by group, or a
    file of these (`conversion.groups`).

    :raises RecipeError: naming the field, its value and what is allowed.
    """

    transform: str = "ke"
    ranks: Sequence[int] | str = DEFAULT_RANKS
    shared_size: int | None = None
    kernel: str = "r_1"
    slice: str = "center"
    groups: str | Path | Mapping[str, list[str]] = "layer"

    def __post_init__(self) -> None:
        check_choice("transform", self.transform, TRANSFORM_NAMES)
        Structure(transform=self.transform, shared_size=self.shared_size, kernel=self.kernel, slice=self.slice)
        object.__setattr__(self, "ranks", self._triple())

    def _triple(self) -> RankTriple:
        if isinstance(self.ranks, str):
            check_choice("ranks", self.ranks, PRESETS)
            if self.transform == "none":
                raise RecipeError(f"ranks is {self.ranks!r}: transform none has no presets", "ranks", "transform")
            return PRESETS[self.ranks][self.transform]
        ranks = tuple(self.ranks)
        if len(ranks) != 3:
            raise RecipeError(f"ranks is {ranks}: three whole numbers, local, intra and inter, are allowed", "ranks")
        for rank in ranks:
            check_whole("ranks", -1 if rank is None else rank, 0, LARGEST_RANK)
        if not any(ranks):
            raise RecipeError(f"ranks is {ranks}: one of them at least is above zero", "ranks")
        if self.transform == "none" and any(ranks[1:]):
            raise RecipeError(f"ranks is {ranks}: with transform none nothing is shared", "ranks", "transform")
        local, intra, inter = ranks
        return local, intra, inter

    def layout(self, found: Mapping[str, Entry]) -> Layout:
        """The layout on these modules, of which shapes and kinds are taken.

        :raises InputError: when nobody can share, or a file of groups is bad. :raises RecipeError: for groups that match nothing.
        """
        local, intra, inter = cast(RankTriple, self.ranks)
        sharing = [name for name, entry in found.items() if layer_of(name) is not None and entry.kind == "linear"]
        members = {"intra": self._intra(sharing), "inter": {ENTIRE: sharing}}
        uses: dict[str, dict[str, str]] = {name: {} for name in found}
        shared: dict[str, dict[str, Group]] = {}
        for (level, groups), rank in zip(members.items(), (intra, inter), strict=True):
            if not rank:
                continue
            if not sharing:
                raise InputError(f"none of the {len(found)} modules stands in a numbered layer, so none can share")
            pair, kernel = split_rank(self.kernel, rank)
            shared[level] = {group: Group(pair, kernel) for group in groups}
            for group, names in groups.items():
                for name in names:
                    uses[name][level] = group
        transform = self._transform([found[name].shape for name in sharing]) if shared else None
        entries = {name: Entry(entry.shape, local, uses[name], entry.kind) for name, entry in found.items()}
        return Layout(transform, {name: e for name, e in entries.items() if e.rank or e.groups}, shared)

    def _intra(self, names: Sequence[str]) -> Grouping:
        if isinstance(self.groups, Mapping):
            found = match(self.groups, names)
            if not found:
                raise RecipeError(
                    f"groups match none of {len(names)} modules, such as {next(iter(names), 'none')}", "groups"
                )
            return found
        if self.groups not in GROUPS:
            return read_groups(self.groups, names)
        label = kind_of if self.groups == "kind" else layer_of
        groups: Grouping = {}
        for name in names:
            groups.setdefault(str(label(name)), []).append(name)
        return groups

    def _transform(self, shapes: Iterable[tuple[int, int]]) -> Transform:
        if self.transform == "ss":
            return Slice.covering(shapes, self.slice)
        if self.transform == "gt":
            return Gate(self.shared_size or DEFAULT_SIZE)
        return Kronecker.dividing(shapes, self.shared_size)


def targets(model: nn.Module, target_modules: Any, chosen: Mapping[str, Any]) -> dict[str, Entry]:
    """The modules of a model that PEFT would adapt, with shape and kind, in natural order.

    chosen: PEFT's other fields of the choice (`exclude_modules`, `layers_to_transform`, `layers_pattern`, `modules_to_save`).

    :raises InputError: when there is none, or one that can't be adapted.
    """
    rule = _maybe_include_all_linear_layers(LoraConfig(target_modules=target_modules, **chosen), model)
    found = {}
    for name, module in model.named_modules():
        layer = getattr(module, "base_layer", module)
        if not check_target_module_exists(rule, name):
            continue
        shape = layer_shape(layer)
        if shape is None:
            raise InputError(f"target_modules: {name} is a {type(layer).__name__}, which can't be adapted")
        found[name] = Entry(shape, 0, {}, "embedding" if isinstance(layer, nn.Embedding) else "linear")
    if not found:
        there = sorted({name.rpartition(".")[2] for name, layer in model.named_modules() if layer_shape(layer)})
        raise InputError(f"target_modules is {target_modules!r}: the model has none of them; it has {', '.join(there)}")
    return dict(sorted(found.items(), key=lambda item: natural_order(item[0])))


def fields(form: Fresh, model: nn.Module, target_modules: Any, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the configuration of a new adapter: the layout, and what says that its modules are adapted.

    :raises InputError: as `targets` and `Fresh.layout`.
    """
    asked = list(target_modules) if isinstance(target_modules, tuple | set) else target_modules
    layout = form.layout(targets(model, asked, chosen))
    return {**layout.to_config(), **target_fields(layout.modules, {"target_modules": asked, **chosen})}
