"""Libraries made on the fly: small adapters of mixed ranks and types, some of them broken in different ways."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bslora_convert.library.jobs import Job, Result, failure
from bslora_convert.process.interrupt import heeded
from tests.planting import Product, random_products, write_lora

KINDS = {"self_attn.q_proj": (24, 24), "self_attn.v_proj": (12, 24), "mlp.up_proj": (48, 24), "mlp.down_proj": (24, 48)}


def truncate(place: Path) -> None:
    weights = place / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:700])


def drop_weights(place: Path) -> None:
    (place / "adapter_model.safetensors").unlink()


def spoil_config(place: Path) -> None:
    (place / "adapter_config.json").write_text("{")


def make_dora(place: Path) -> None:
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))


def make_nan(place: Path) -> None:
    products = random_products(layers=1, rank=2, kinds=KINDS)
    first = next(iter(products))
    products[first].held.a[0, 0] = float("nan")
    write_lora(place, products)


BROKEN: tuple[tuple[str, Callable[[Path], None], str, str], ...] = (
    ("truncated", truncate, "failed", "truncated"),
    ("weightless", drop_weights, "failed", "no weights"),
    ("garbled", spoil_config, "failed", "not valid JSON"),
    ("dora", make_dora, "refused", "DoRA"),
    ("nan", make_nan, "failed", "NaN"),
)


def make_library(
    root: Path, count: int, layers: int = 2, broken: bool = True, seed: int = 0
) -> dict[str, tuple[str, str]]:
    """Writes `count` adapters, a tenth of them broken; returns status and words of the bad ones by id."""
    bad = {}
    for number in range(count):
        kind = BROKEN[(number // 10) % len(BROKEN)] if broken and number % 10 == 9 else None
        name = f"tenant-{number % 7}/{kind[0] if kind else 'good'}-{number:03d}"
        products = random_products(layers=layers, rank=2 + number % 5, seed=seed + number, kinds=KINDS)
        write_lora(root / name, products, dtype=(torch.bfloat16, torch.float32)[number % 2], alpha=4.0)
        if kind:
            kind[1](root / name)
            bad[name] = kind[2], kind[3]
    return bad


def tree(out: Path) -> dict[str, bytes]:
    """Every file of the adapters' directories; manifest and summary hold times."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.parent != out and ".batch" not in path.parts
    }


__all__ = ["BROKEN", "KINDS", "Product", "make_library", "tree"]


def takes_an_interrupt_for_damage(job: Job) -> Result:
    """Work whose library makes an error of its own of an interrupt that comes while it reads."""
    try:
        with heeded():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            except KeyboardInterrupt:
                raise ValueError("damaged") from None
    except ValueError as error:
        return failure(job, "failed", "ValueError", str(error), final=True)
    raise AssertionError
