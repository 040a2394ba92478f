"""How to convert one adapter: a few parts that each check themselves, and the rules between them.

    structure    which transform, who shares, which ranks     asked     the behaviour, error or size that the result must reach
    calibration  base model, prompts, metric, distillation    storage   dtype and codes
    reading      what the user knows of the source, where it does not say

Options are given flat, under the names that the command line has, and stand flat in records and files.
"""

from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Self

from bslora_convert.errors import RecipeError
from bslora_convert.recipe.calibration import Calibration
from bslora_convert.recipe.checks import check_whole
from bslora_convert.recipe.options import RUNNING, device_option, option
from bslora_convert.recipe.reading import Reading
from bslora_convert.recipe.storage import INITS, Storage
from bslora_convert.recipe.structure import Structure
from bslora_convert.recipe.target import TARGETS, Asked, Target, resolved

RECIPE_PARTS = {
    "structure": Structure,
    "asked": Asked,
    "calibration": Calibration,
    "storage": Storage,
    "reading": Reading,
}


@dataclass(frozen=True, slots=True, init=False, repr=False)
class Recipe:
    """Every option of a conversion. device, seed: where to compute, and from which random numbers.

    :raises RecipeError: naming the option, its value and what is allowed.
    """

    structure: Structure
    asked: Asked
    calibration: Calibration
    storage: Storage
    reading: Reading
    device: str = device_option()
    seed: int = option(0, "Draw random numbers from this; the same seed gives the same bytes.", RUNNING)

    def __init__(self, **options: Any) -> None:
        """options: by the names of the parts' fields, and device and seed."""
        for name, part in RECIPE_PARTS.items():
            own = {one.name: options.pop(one.name) for one in fields(part) if one.name in options}
            object.__setattr__(self, name, part(**own))
        for name, default in OWN.items():
            object.__setattr__(self, name, options.pop(name, default))
        if options:
            raise RecipeError(f"{sorted(options)[0]} is no option of a recipe")
        by_hand, given = self.asked.ranks is not None, self.structure
        local_ranks = given.local_ranks or ("uniform" if by_hand else "adaptive")
        max_rank = ("none" if by_hand else "slot") if given.max_rank is None else given.max_rank
        object.__setattr__(self, "structure", replace(given, local_ranks=local_ranks, max_rank=max_rank))
        check_whole("seed", self.seed, 0, (1 << 63) - 1)
        self._check_device()
        self._check_together()

    def _check_device(self) -> None:
        kind, _, number = str(self.device).partition(":")
        if kind not in ("auto", "cpu", "cuda") or (number and (kind != "cuda" or not number.isdigit())):
            raise RecipeError(f"device is {self.device!r}: auto, cpu, cuda or cuda:N is allowed", "device")

    def _check_together(self) -> None:
        """What one part allows of another."""
        structure, asked = self.structure, self.asked
        if asked.ranks is not None and structure.transform == "none" and any(asked.ranks[1:]):
            raise RecipeError(
                f"ranks is {asked.ranks!r}: with transform none only L,0,0 is allowed", "ranks", "transform"
            )
        if asked.chooses_precision and structure.is_uniform:
            name = asked.option
            raise RecipeError(
                f"local_ranks is 'uniform': with {name} every module's rank is chosen; adaptive is allowed",
                "local_ranks",
                name,
            )

        if self.storage.init not in INITS[:2] and self.storage.bits is None and not asked.chooses_precision:
            raise RecipeError(
                f"init is {self.storage.init!r}: with {asked.option} numbers are stored as floats; give bytes, "
                "max_error or bits",
                "init", asked.option,
            )  # fmt: skip

    def check_target(self) -> None:
        """:raises RecipeError: for a behaviour without prompts to measure it on, or an error that distillation would not keep."""
        if self.asked.measure is not None and self.calibration.prompts is None:
            name = self.asked.option
            raise RecipeError(
                f"{name} is measured on prompts that the fit has not seen: give base_model and prompts", name, "prompts"
            )
        if self.asked.is_given and self.asked.max_error is not None and self.calibration.finetune is not None:
            raise RecipeError(
                f"max_error is {self.asked.max_error:g}: finetune gives up nearness of the weights for that of the behaviour; "
                "give bytes, or min_retention, max_kl or min_agreement with prompts",
                "max_error", "finetune", "bytes", "min_retention", "max_kl", "min_agreement", "prompts",
            )  # fmt: skip

    def resolved(self, parameters: int, file_bytes: int, slot: int | None) -> tuple[Structure, Target]:
        """Structure and target for one source.

        parameters: numbers of the LoRA. file_bytes: of its weight file. slot: rank of the server slot that it takes, None where
        no slot holds it.
        """
        structure = self.structure.in_slot(slot)
        target = replace(
            resolved(self.asked, parameters, file_bytes),
            width=self.storage.bits, unbiased=self.storage.is_unbiased, most_rank=structure.most_rank,
        )  # fmt: skip
        return structure, target

    def but(self, **changes: Any) -> Self:
        """The same recipe with other values of some options; what follows from them is decided anew."""
        return type(self)(**{**self.options(), **changes})

    def options(self) -> dict[str, Any]:
        """Every option by name, as used; a target that nobody asked for is none."""
        found = {
            one.name: getattr(getattr(self, name), one.name)
            for name, part in RECIPE_PARTS.items()
            for one in fields(part)
            if one.init
        }
        unasked = {} if self.asked.is_given else dict.fromkeys(TARGETS)
        return found | unasked | {name: getattr(self, name) for name in OWN}

    def to_dict(self) -> dict[str, Any]:
        """Every option as used, as JSON holds it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self.options().items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The recipe that `to_dict` wrote.

        :raises RecipeError: for an option that is not known.
        """
        return cls(**values)

    def given(self) -> dict[str, Any]:
        """The options that are not what they would be anyway."""
        said, always = self.options(), ("transform", *TARGETS)
        usual = type(self)(**{name: said[name] for name in always}).options()
        order = [*always, *(name for name in said if name not in always)]
        return {n: said[n] for n in order if said[n] is not None and (n in always or said[n] != usual[n])}

    def __repr__(self) -> str:
        said = ", ".join(f"{name}={value!r}" for name, value in self.given().items())
        return f"Recipe({said})"


OWN = {one.name: one.default for one in fields(Recipe) if one.default is not MISSING}
