"""What goes out: the BSLoRA form, its transforms, its storage."""
