"""Many adapters on one model at a cost that grows with their number.

PEFT's `load_adapter` goes through every parameter of every adapter that is there already: to note which of them get gradients, to
take the model's state dict for the new keys and again to load them, to set the active adapter. Here a new adapter is put into the
same structures and the others are not looked at.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from peft import PeftModel
from torch import nn

from bslora_convert.bslora.codes.file import NAMES
from bslora_convert.bslora.storage import PREFIX, WEIGHTS_NAME
from bslora_convert.errors import RecipeError
from bslora_convert.files.address import MARK, resolve
from bslora_convert.files.tensorfile import read_tensors
from bslora_convert.peft.config import BsloraConfig
from bslora_convert.peft.model import BsloraModel


def load_many(
    model: nn.Module,
    library: str | Path,
    names: Iterable[str] | Mapping[str, str],
    *,
    resident: str = "codes",
    decoded_bytes: int | None = None,
    autocast_adapter_dtype: bool = True,
    accept_changed: bool = False,
) -> PeftModel:
    """Loads adapters of a library for inference; the model that it returns is PEFT's, and does all that PEFT's does.

    model: a base model, of which the first adapter becomes the active one, or a PeftModel with compact adapters.
    library: a directory of compact directories, or a URL of one. names: the adapters' in it, or a mapping of what each is to be
    called on the model to that; PEFT takes no dots. resident, decoded_bytes: as of `BsloraConfig`. autocast_adapter_dtype: as
    PEFT's. accept_changed: as of `load_compact`.

    :raises InputError: when an adapter is missing, damaged or made for another model; those before it stay loaded.
    :raises RecipeError: for a name that is taken or can't be one, a model with adapters of another kind, or a wrong option.
    """
    wanted = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
    taken = set(model.peft_config) if isinstance(model, PeftModel) else set()
    for name in wanted:
        if "." in name or name in taken:
            reason = "is there already" if name in taken else "has a dot, which PEFT takes in no name"
            raise RecipeError(
                f"adapter {name!r} {reason}: give names as a mapping, {{name: name in the library}}", "names"
            )
    for name, identity in wanted.items():
        directory = resolve(f"{library}{MARK}{identity}")
        config = BsloraConfig.from_pretrained(
            str(directory), resident=resident, decoded_bytes=decoded_bytes, accept_changed=accept_changed
        )
        config.inference_mode = True
        if not isinstance(model, PeftModel):
            model = PeftModel.from_pretrained(
                model, str(directory), name, config=config, autocast_adapter_dtype=autocast_adapter_dtype
            )
            continue
        tuner = model.base_model
        if not isinstance(tuner, BsloraModel):
            raise RecipeError(f"the model has adapters of another kind: {type(tuner).__name__}", "model")
        tensors = read_tensors(directory / WEIGHTS_NAME)
        if all(_is_of_the_form(key) for key in tensors):
            tuner.put(name, config, tensors, autocast_adapter_dtype)
        else:  # whole weights of the model travel along, which PEFT has its own places for
            model.add_adapter(name, config, autocast_adapter_dtype=autocast_adapter_dtype)
            model.load_adapter(str(directory), name, autocast_adapter_dtype=autocast_adapter_dtype)
    if not isinstance(model, PeftModel):
        raise RecipeError("names is empty: at least one adapter is needed", "names")
    return model


def _is_of_the_form(key: str) -> bool:
    return key.removeprefix(PREFIX) in NAMES or ".bslora_" in key
