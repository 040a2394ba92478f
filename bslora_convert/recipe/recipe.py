"""How to convert one adapter: a few parts that each check themselves, and the rules between them.

    form      which transform, who shares, which ranks      aim        the behaviour, error or size that the result must reach
    evidence  base model, prompts, metric, distillation     storage    dtype and codes
    scaling   the source's, where it does not say

Options are given flat, under the names that the command line has, and stand flat in records and files.
"""

from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Self

from bslora_convert.errors import RecipeError
from bslora_convert.recipe.aim import AIMS, Aim
from bslora_convert.recipe.checks import check_whole
from bslora_convert.recipe.evidence import Evidence
from bslora_convert.recipe.form import Form
from bslora_convert.recipe.options import RUNNING, device_option, option
from bslora_convert.recipe.scaling import Scaling
from bslora_convert.recipe.storage import Storage

PARTS = {"form": Form, "aim": Aim, "evidence": Evidence, "storage": Storage, "scaling": Scaling}


@dataclass(frozen=True, slots=True, init=False, repr=False)
class Recipe:
    """Every option of a conversion. device, seed: where to compute, and from which random numbers.

    :raises RecipeError: naming the option, its value and what is allowed.
    """

    form: Form
    aim: Aim
    evidence: Evidence
    storage: Storage
    scaling: Scaling
    device: str = device_option()
    seed: int = option(0, "Draw random numbers from this; the same seed gives the same bytes.", RUNNING)

    def __init__(self, **options: Any) -> None:
        """options: by the names of the parts' fields, and device and seed."""
        for name, part in PARTS.items():
            own = {one.name: options.pop(one.name) for one in fields(part) if one.name in options}
            object.__setattr__(self, name, part(**own))
        for name, default in OWN.items():
            object.__setattr__(self, name, options.pop(name, default))
        if options:
            raise RecipeError(f"{sorted(options)[0]} is no option of a recipe")
        by_hand = self.aim.ranks is not None
        if self.form.local_ranks is None:
            object.__setattr__(self, "form", replace(self.form, local_ranks="uniform" if by_hand else "adaptive"))
        if self.form.max_rank is None:
            object.__setattr__(self, "form", replace(self.form, max_rank="none" if by_hand else "slot"))
        check_whole("seed", self.seed, 0, (1 << 63) - 1)
        self._check_device()
        self._check_together()

    def _check_device(self) -> None:
        kind, _, number = str(self.device).partition(":")
        if kind not in ("auto", "cpu", "cuda") or (number and (kind != "cuda" or not number.isdigit())):
            raise RecipeError(f"device is {self.device!r}: auto, cpu, cuda or cuda:N is allowed", "device")

    def _check_together(self) -> None:
        """What one part allows of another."""
        form, aim = self.form, self.aim
        if aim.ranks is not None and form.transform == "none" and any(aim.ranks[1:]):
            raise RecipeError(
                f"ranks is {aim.ranks!r}: with transform none only L,0,0 is allowed", "ranks", "transform"
            )
        if aim.chooses_precision and form.local_ranks == "uniform":
            name = next(name for name in AIMS if getattr(aim, name) is not None)
            raise RecipeError(
                f"local_ranks is 'uniform': with {name} every module's rank is chosen; adaptive is allowed",
                "local_ranks",
                name,
            )

    def check_evidence(self) -> None:
        """:raises RecipeError: when a behaviour is aimed at and there is nothing to measure it on."""
        if self.aim.behaviour is not None and self.evidence.prompts is None:
            name = self.aim.behaviour[0]
            raise RecipeError(
                f"{name} is measured on prompts that the fit has not seen: give base_model and prompts", name, "prompts"
            )

    @property
    def is_coded(self) -> bool:
        """Whether numbers are stored in codes."""
        return self.aim.chooses_precision or self.storage.bits is not None

    @property
    def is_uniform(self) -> bool:
        """Whether all modules get one local rank."""
        return self.form.local_ranks == "uniform"

    def but(self, **changes: Any) -> Self:
        """The same recipe with other values of some options; what follows from them is decided anew."""
        return type(self)(**{**self.options(), **changes})

    def options(self) -> dict[str, Any]:
        """Every option by name, as used; an aim that nobody asked for is none."""
        found = {
            one.name: getattr(getattr(self, name), one.name)
            for name, part in PARTS.items()
            for one in fields(part)
            if one.init
        }
        unasked = {} if self.aim.asked else dict.fromkeys(AIMS)
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
        said, always = self.options(), ("transform", *AIMS)
        usual = type(self)(**{name: said[name] for name in always}).options()
        order = [*always, *(name for name in said if name not in always)]
        return {n: said[n] for n in order if said[n] is not None and (n in always or said[n] != usual[n])}

    def __repr__(self) -> str:
        said = ", ".join(f"{name}={value!r}" for name, value in self.given().items())
        return f"Recipe({said})"


OWN = {one.name: one.default for one in fields(Recipe) if one.default is not MISSING}
