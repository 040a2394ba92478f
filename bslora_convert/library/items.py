"""What a library holds: an identity for each adapter, and where it is."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bslora_convert.errors import InputError
from bslora_convert.files.address import check_id


@dataclass(frozen=True, slots=True)
class Item:
    """One adapter: `id` names its output directory, `uri` is a path or an fsspec URL, `revision` a hub's.

    prompts, base_model: its own prompt file and base model, in the place of those that the whole library has.
    """

    id: str
    uri: str
    revision: str | None = None
    prompts: str | None = None
    base_model: str | None = None

    @property
    def is_remote(self) -> bool:
        """Whether it has to be fetched."""
        return "://" in self.uri


def check_ids(items: Sequence[Item], where: str) -> None:
    """Refuses identities that can't be directories beside each other.

    :raises InputError: naming the identity.
    """
    seen: set[str] = set()
    for item in items:
        check_id(item.id, where)
        if item.id in seen:
            raise InputError(f"{where}: id {item.id!r} stands there twice")
        seen.add(item.id)
    for item in items:
        parts = item.id.split("/")
        for length in range(1, len(parts)):
            above = "/".join(parts[:length])
            if above in seen:
                raise InputError(f"{where}: id {item.id!r} lies inside of {above!r}, which is an adapter itself")


def safe_ids(names: Iterable[str]) -> list[str]:
    """Identities from file names: every sign that is not allowed becomes `_`, and a hash tells apart what that made alike."""
    names = list(names)
    safe = [
        "/".join(re.sub(r"[^A-Za-z0-9._+=@-]", "_", part).lstrip(".-+=@") or "_" for part in name.split("/"))
        for name in names
    ]
    alike = Counter(safe)
    return [
        made if alike[made] == 1 or made == name else f"{made}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        for name, made in zip(names, safe, strict=True)
    ]


def shard_of(items: Sequence[Item], shard: tuple[int, int]) -> list[Item]:
    """Every N-th item from the I-th on, (I, N) counted from 1; stable for the same library."""
    index, count = shard
    return list(items[index - 1 :: count])
