"""What modules' names say: the layer, the kind, the natural order."""


def layer_of(name: str) -> str | None:
    """The numbered layer that a module stands in: its path up to the first number, or None outside of layers.

    `model.layers.3.mlp.up_proj` -> `model.layers.3`; encoder and decoder layers differ by their prefix.
    """
    parts = name.split(".")
    for position, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return ".".join(parts[: position + 1])
    return None


def natural_order(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Sorting key of modules' names under which layer 2 stands before layer 10."""
    return tuple((part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split("."))


def kind_of(name: str) -> str:
    """A module's place within its layer, the same in every layer: `mlp.up_proj`; the whole name outside of layers."""
    layer = layer_of(name)
    return name.removeprefix(f"{layer}.") if layer else name
