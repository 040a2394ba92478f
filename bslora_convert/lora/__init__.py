"""What comes in: a PEFT LoRA adapter."""

from bslora_convert.lora.adapter import LoraAdapter, LoraModule, load_lora

__all__ = ["LoraAdapter", "LoraModule", "load_lora"]
