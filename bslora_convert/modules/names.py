"""What modules' names say: the layer, the kind, the natural order."""

LONGEST = 18  # digits of what is taken for a number


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
    numbers = [int(part) if part.isdecimal() and len(part) <= LONGEST else None for part in name.split(".")]
    return tuple((n is not None, n or 0, part) for n, part in zip(numbers, name.split("."), strict=True))


def kind_of(name: str) -> str:
    """A module's place within its layer, the same in every layer: `mlp.up_proj`; the whole name outside of layers."""
    layer = layer_of(name)
    return name.removeprefix(f"{layer}.") if layer else name


def place_of(name: str) -> tuple[str, int, str] | None:
    """(What its layers are called, the number of its own, its kind); None outside of layers."""
    layer = layer_of(name)
    if layer is None:
        return None
    stack, _, number = layer.rpartition(".")
    return stack, int(number), kind_of(name)
