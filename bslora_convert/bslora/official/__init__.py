"""The BSLoRA authors' checkpoint layout, read into our form and written from it."""

from bslora_convert.bslora.official.plan import OFFICIAL_TYPE
from bslora_convert.bslora.official.reader import OfficialAdapter, is_official, load_official
from bslora_convert.bslora.official.writer import save_official

__all__ = ["OFFICIAL_TYPE", "OfficialAdapter", "is_official", "load_official", "save_official"]
