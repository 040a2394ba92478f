"""`adapter_config.json` of a compact directory as PEFT reads it."""

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from bslora_convert.bslora.layout import Layout
from bslora_convert.bslora.storage import CONFIG_NAME, FORMAT_VERSION, PEFT_TYPE, is_coded
from bslora_convert.errors import RecipeError

TRAINED = ("local", "shared", "all")


@dataclass
class BsloraConfig(PeftConfig):
    """Configuration of one compact adapter.

    transform, shared, modules: the layout, see `docs/format.md`; every tensor's shape follows from it.
    dtype: what the tensors are stored in; weights that are still exact in it are saved in it again.
    coding: how the file's numbers are coded; None once they are decoded, as they are saved again as floats.
    train: which parts get gradients when the adapter is trainable: `local`, `shared` (pairs, kernels and gates) or `all`.
    """

    format_version: int = FORMAT_VERSION
    coding: dict[str, Any] | None = None
    dtype: str = "float32"
    transform: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, Any] = field(default_factory=dict)
    train: str = "all"
    target_modules: list[str] | set[str] | str | None = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    def __post_init__(self) -> None:
        """Checks what a wrong file would get wrong later.

        :raises InputError: for an unknown format or a broken layout. :raises RecipeError: for an unknown value of `train`.
        """
        super().__post_init__()  # type: ignore[no-untyped-call]
        from peft.utils.peft_types import PeftType

        self.peft_type = PeftType[PEFT_TYPE]
        is_coded({"format_version": self.format_version, "coding": self.coding}, CONFIG_NAME)
        if self.train not in TRAINED:
            raise RecipeError(f"train is {self.train!r}: one of {', '.join(TRAINED)} is allowed")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        self.layout()

    def layout(self) -> Layout:
        """The layout that the fields describe."""
        return Layout.parse({"transform": self.transform, "shared": self.shared, "modules": self.modules}, CONFIG_NAME)
