"""The layers of a base model that an adapter is put on: their shapes, what they are called, experts that are stacked."""
