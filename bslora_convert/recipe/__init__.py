"""What is asked for: every option of a conversion and of a distillation, checked once."""
