"""Everything that runs the base model."""
