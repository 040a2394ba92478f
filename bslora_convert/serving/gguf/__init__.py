"""An adapter as one GGUF file, as llama.cpp reads it (`--lora`)."""

from bslora_convert.serving.gguf.file import GGUF_NAME, read_gguf, write_gguf
from bslora_convert.serving.gguf.models import ARCHITECTURES, Base, read_base

__all__ = ["ARCHITECTURES", "GGUF_NAME", "Base", "read_base", "read_gguf", "write_gguf"]
