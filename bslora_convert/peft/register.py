"""Makes PEFT know the method BSLORA."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

from bslora_convert.bslora.storage import PEFT_TYPE
from bslora_convert.peft.config import BsloraConfig
from bslora_convert.peft.model import BsloraModel


def register() -> None:
    """Registers the tuner once; a PEFT that brings a method of this name keeps its own."""
    member = _add_member(PEFT_TYPE)
    if member not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=PEFT_TYPE.lower(), config_cls=BsloraConfig, model_cls=BsloraModel)


def _add_member(name: str) -> PeftType:
    """Adds a member to PEFT's enum of methods, as its class statement would have.

    `register_peft_method` takes only members of the enum, and an enum with members can't be subclassed.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member
