"""A tenant's name -> the directory that vLLM loads: found, checked, decoded, written once."""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bslora_convert.bslora.common import found_from, is_intact, provide
from bslora_convert.bslora.layout import Layout
from bslora_convert.bslora.storage import (
    CONFIG_NAME,
    PEFT_TYPE,
    WEIGHTS_NAME,
    CompactAdapter,
    check_version,
    load_compact,
)
from bslora_convert.errors import InputError, Refused
from bslora_convert.files.landing import replace_file
from bslora_convert.files.record import FIDELITY_NAME
from bslora_convert.layers.slots import TARGET_MODULES, left_out
from bslora_convert.lora.fused import in_fused
from bslora_convert.lora.writer import save_lora
from bslora_convert.modules.factors import Shape
from bslora_convert.serving.engines import ENGINES
from bslora_convert.serving.shape import listed, reasons
from bslora_convert.version import __version__
from bslora_convert.vllm.base import check_name, check_shapes, shapes_of
from bslora_convert.vllm.library import LARGEST, Away, opened
from bslora_convert.vllm.settings import Settings
from bslora_convert.vllm.snapshots import PARTIAL, Snapshots, digest_of, read_small

FIELDS_NAME = "lora.json"  # in a compact snapshot: the fields of a LoRA's configuration that vLLM reads
TRIES, PAUSE = 3, 0.1  # `batch` puts a new result into an old one's place by two renames


@dataclass(frozen=True, slots=True)
class Tenant:
    """path: what vLLM loads. bytes: of the compact weights. written: whether it had to be decoded."""

    path: Path
    bytes: int
    written: bool


@dataclass(frozen=True, slots=True)
class Files:
    """What one adapter consists of, as it was read: weights and configuration, and the record that has their hash."""

    config: bytes
    weights: bytes
    record: bytes | None

    @property
    def digest(self) -> str:
        """Of everything that decides what is written."""
        return digest_of(__version__, self.config, self.weights, self.record or b"")


class Tenants:
    """A compact library as one server sees it.

    :raises OSError: when the cache can't be used.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.snapshots = Snapshots(settings.cache, settings.cache_bytes, settings.plan)
        self.library = opened(settings.library)
        self._shapes: dict[str, dict[str, Shape]] = {}

    def find(self, name: str, base: str) -> Tenant | None:
        """The tenant of a name, for the base model that is served; None where the library holds none.

        :raises InputError: when it is damaged or can't be fetched. :raises Refused: when it is for another base, can't be served,
            or has no room.
        """
        for left in reversed(range(TRIES)):
            try:
                with self.library.tenant(name) as place:
                    if place is not None:
                        return self._tenant(place, base)
                if not left or not self.library.being_replaced(name):
                    return None
            except Away:
                raise
            except InputError:
                if not left:
                    raise
            time.sleep(PAUSE)
        return None

    def _tenant(self, place: Path, base: str) -> Tenant:
        files = read_files(place)
        config, layout = parsed(files, place)
        check_name(config.get("base_model_name_or_path"), base, self.settings.aliases)
        if base not in self._shapes:
            self._shapes[base] = shapes_of(base)
        check_shapes(layout.modules, self._shapes[base])
        if self.settings.kinds is not None and (other := left_out(layout.modules, self.settings.kinds)):
            raise Refused(
                f"it adapts {', '.join(other)}, and the server was started with {TARGET_MODULES} "
                f"{' '.join(sorted(self.settings.kinds))}: it would apply the rest alone"
            )
        self._keep_common(layout, place)
        fill = WRITERS[self.settings.plan]
        path, written = self.snapshots.get(files.digest, lambda out: fill(files, config, out))
        most = self.settings.rank
        if most is not None and (needed := rank_in(path)) > most:
            raise Refused(f"its expanded rank is {needed}, and the server's --max-lora-rank is {most}")
        return Tenant(path, len(files.weights), written)

    def _keep_common(self, layout: Layout, place: Path) -> None:
        """Reads what a tenant's codes are against, and keeps it above its snapshot for workers that decode.

        :raises InputError: when it is not there, or damaged.
        """
        provide(layout, place)
        name = None if layout.origin is None else layout.origin.file
        if name is not None and not is_intact(self.snapshots.place / name):
            replace_file(self.snapshots.place / name, found_from(place, name).read_bytes())


def rank_in(snapshot: Path) -> int:
    """The largest rank of what was handed out."""
    name = FIELDS_NAME if (snapshot / FIELDS_NAME).is_file() else CONFIG_NAME
    return int(json.loads((snapshot / name).read_text(encoding="utf-8"))["r"])


def read_files(place: Path) -> Files:
    """An adapter's files.

    :raises InputError: when one is missing or too large.
    """
    config, weights, record = (place / name for name in (CONFIG_NAME, WEIGHTS_NAME, FIDELITY_NAME))
    return Files(
        read_small(config, LARGEST[CONFIG_NAME]),
        read_small(weights, LARGEST[WEIGHTS_NAME]),
        read_small(record, LARGEST[FIDELITY_NAME]) if record.is_file() else None,
    )


def parsed(files: Files, place: Path) -> tuple[dict[str, Any], Layout]:
    """The configuration and the layout that it describes.

    :raises InputError: when they are not those of a compact adapter.
    """
    where = place / CONFIG_NAME
    try:
        config = json.loads(files.config)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(config, dict) or config.get("peft_type") != PEFT_TYPE:
        raise InputError(f"{where}: no compact adapter")
    check_version(config, where)
    return config, Layout.parse(config, where)


def copy_to(files: Files, out: Path) -> None:
    """Writes an adapter's files into a directory."""
    for name, data in ((CONFIG_NAME, files.config), (WEIGHTS_NAME, files.weights), (FIDELITY_NAME, files.record)):
        if data is not None:
            (out / name).write_bytes(data)


def write_lora(files: Files, config: dict[str, Any], out: Path) -> None:
    """Decodes an adapter into an empty directory, as a LoRA for vLLM.

    :raises InputError: when it is damaged. :raises Refused: when vLLM can't serve it.
    """
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=out.parent) as room:  # below what the library has in common
        copy = Path(room) / "adapter"
        copy.mkdir()
        copy_to(files, copy)
        adapter = servable(copy)
    form = adapter.form
    kinds = {name: module.kind for name, module in form.modules.items()}
    modules = {name: form.delta(name) for name in form.modules}
    save_lora(out, modules, kinds, {}, listed(config, modules), adapter.dtype)


def write_compact(files: Files, config: dict[str, Any], out: Path) -> None:
    """Copies an adapter into an empty directory, with what a worker has to know of it before it decodes it.

    :raises InputError: when it is damaged. :raises Refused: when vLLM can't serve it.
    """
    copy_to(files, out)
    form = servable(out).form
    if in_fused(form.modules):
        raise Refused(
            "its experts are fused, which workers that decode do not put together: BSLORA_PLAN=lora serves it"
        )
    ranks = {name: form.expanded_rank(name) for name in form.modules}
    largest = max(1, *ranks.values())
    fields = {"r": largest, "lora_alpha": largest, **listed({}, ranks)}
    (out / FIELDS_NAME).write_text(json.dumps(fields), encoding="utf-8")


def servable(directory: Path) -> CompactAdapter:
    """An adapter that vLLM can serve.

    :raises InputError: when it is damaged. :raises Refused: when vLLM can't serve it.
    """
    adapter = load_compact(directory)
    form = adapter.form
    kinds = {name: module.kind for name, module in form.modules.items()}
    engine = replace(ENGINES["vllm"], heads=frozenset())  # a head is the server's own, whoever asks
    why = reasons(engine, kinds, adapter.carried, max(form.expanded_rank(name) for name in form.modules))
    if why:
        raise Refused("; ".join(why))
    return adapter


WRITERS: dict[str, Callable[[Files, dict[str, Any], Path], None]] = {"lora": write_lora, "compact": write_compact}
