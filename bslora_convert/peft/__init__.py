"""Compact adapters in PEFT. Importing this package registers the tuner.

    import bslora_convert.peft
    model = PeftModel.from_pretrained(model, compact_dir)
    model = load_many(model, library, names)

PEFT's list of methods is a closed enum, so registering adds a member to it; without the import PEFT answers `KeyError: 'BSLORA'`.
`bslora_convert.load_into` needs neither.
"""

from bslora_convert.peft.config import BsloraConfig
from bslora_convert.peft.layer import BsloraLayer
from bslora_convert.peft.many import load_many
from bslora_convert.peft.model import BsloraModel
from bslora_convert.peft.register import register

register()

__all__ = ["BsloraConfig", "BsloraLayer", "BsloraModel", "load_many"]
