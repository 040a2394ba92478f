"""What comes in: a PEFT LoRA adapter."""

from bslora_convert.lora.adapter import LoraAdapter, load_lora
from bslora_convert.lora.module import LoraModule

__all__ = ["LoraAdapter", "LoraModule", "load_lora"]
