"""How a LoRA becomes the form: pure tensor functions, no files, no printing."""
