"""One base model in memory from one adapter to the next, in processes that work on many: the last one that was read.

Nothing is kept unless a process asks for it (`keep_base`, `base_kept`). Whoever takes the base leaves it as it was
(`BaseModelSession.close`); after work that failed it is let go (`drop_base`), as nobody knows what was left on it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from bslora_convert.behaviour.known import Known
from bslora_convert.behaviour.model import BaseModel, load_base


@dataclass(slots=True)
class _Kept:
    """What this process keeps. key: name, device and dtype that it was asked for by. bare: what the base predicts by itself."""

    wanted: bool = False
    key: tuple[str, str, str] | None = None
    base: BaseModel | None = None
    bare: Known | None = None


_kept = _Kept()


def take_base(
    name: str | Path, device: str, dtype: str, fits: Callable[[nn.Module], None] = lambda _: None
) -> BaseModel:
    """The base model that is kept, or as `load_base` reads it; fits: as there.

    Raises what `load_base` and `fits` raise.
    """
    key = (str(name), device, dtype)
    if _kept.base is not None and _kept.key == key:
        fits(_kept.base.model)
        return _kept.base
    drop_base()  # two don't have to fit beside each other
    base = load_base(name, device, dtype, fits)
    if _kept.wanted:
        _kept.key, _kept.base = key, base
    return base


def keep_base() -> None:
    """From now on this process keeps the base model that it read last."""
    _kept.wanted = True


def drop_base() -> None:
    """Lets the base model go; the next one is kept again where that was asked for."""
    _kept.key = _kept.base = _kept.bare = None


def bare_of(base: BaseModel) -> Known:
    """What a base predicts by itself: of one that is kept each row is run once for all adapters; of others nothing is kept."""
    if base is not _kept.base:
        return Known(base, nullcontext(), keep=False)
    if _kept.bare is None:
        _kept.bare = Known(base, nullcontext())
    return _kept.bare


@contextmanager
def base_kept() -> Iterator[None]:
    """Inside, the base model that was read last is kept."""
    before, _kept.wanted = _kept.wanted, True
    try:
        yield
    finally:
        _kept.wanted = before
        if not before:
            drop_base()
