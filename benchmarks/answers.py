"""How strongly a base model answers to what training changed of A, and whether knowing it for each component helps.

    python benchmarks/answers.py LORA --base-model BASE --prompts CALIBRATION.jsonl --heldout ROWS.jsonl [--limit 30]
        [--shares 0.0625,0.03125] [--kappas 1,4,16]

For each right vector v = t A₀ + r of a module, with inputs x on the calibration rows:

    answer(y) = E(y·x)² in / (‖y‖² E‖x‖²)        1 for directions that are like any other

Table 1: quantiles of answer(r), which is what κ of `coding/items.py` stands for, and of answer(t A₀), by kind of module.
Table 2: the KL on held-out rows of files of the same bytes, with one κ for all components, with each component's own answer(r) in
its place, and with answers weighing the noise of u as well (a metric of inputs with learned and random parts told apart).
"""

import argparse
from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import local
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bslora_convert import load_lora
from bslora_convert.behaviour.adapter import Adapter
from bslora_convert.behaviour.prompts import Prompts, batches
from bslora_convert.behaviour.session import BaseModelSession
from bslora_convert.coding import components, items
from bslora_convert.coding.items import Against
from bslora_convert.conversion.convert import convert
from bslora_convert.conversion.fidelity import compare
from bslora_convert.conversion.initial import look_for
from bslora_convert.conversion.request import Request
from bslora_convert.files.hashing import sha256
from bslora_convert.fit.source import Source, measure
from bslora_convert.lora import LoraAdapter
from bslora_convert.modules.names import kind_of
from bslora_convert.recipe.recipe import Recipe

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def moments(session: BaseModelSession, prompts: Path, names: list[str], limit: int) -> dict[str, Tensor]:
    """E[x xᵀ] (in, in) of every module on some rows, float64, the original adapter on."""
    found: dict[str, Tensor] = {}
    layers = dict(session.base.model.named_modules())

    def hook(name: str) -> Any:
        def add(_: Any, inputs: Any) -> None:
            x = inputs[0].detach().double().flatten(0, -2)
            found[name] = found.get(name, 0) + x.T @ x

        return add

    handles = [layers[name].register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad(), session.reference:
        for batch in batches(session.encode(Prompts.read(prompts, limit=limit)).examples, 8, session.base.pad):
            session.base.predictions(batch)
    for handle in handles:
        handle.remove()
    return found


def answers(source: Source, fed: Mapping[str, Tensor]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """answer(t A₀) and answer(r) of every component, by module."""
    assert source.initial is not None  # checked before
    found = {}
    for name in source.initial.modules:
        svd, base, moment = source.svds[name], source.initial.base(name), fed[name]
        assert base is not None  # of a module that has one
        v = svd.truncate([source.deltas[name].factors()], len(svd.energies)).a.double()
        drawn = v @ torch.linalg.pinv(base.double()) @ base.double()

        def answer(y: Tensor, moment: Tensor = moment) -> np.ndarray:
            power = ((y @ moment) * y).sum(1) / y.square().sum(1).clamp_min(1e-300)
            return (power * len(moment) / moment.trace()).numpy()

        found[name] = answer(drawn), answer(v - drawn)
    return found


def show_answers(found: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Table 1."""
    table = Table("module", *(f"r, {share:.0%}" for share in QUANTILES), "t A₀, 50%")
    kinds: dict[str, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    for name, pair in found.items():
        kinds[kind_of(name)].append(pair)
    for kind, pairs in kinds.items():
        drawn, rest = (np.concatenate(side) for side in zip(*pairs, strict=True))
        table.add_row(kind, *(f"{value:.1f}" for value in np.quantile(rest, QUANTILES)), f"{np.median(drawn):.2f}")
    Console(width=120).print(table)


class Answering:
    """Within it, components are chosen by their own answers: instead of κ, and with `noise` for the noise of u as well."""

    def __init__(self, found: Mapping[str, tuple[np.ndarray, np.ndarray]], noise: bool) -> None:
        self.found, self.noise, self.here = found, noise, local()
        self.sides, self.items = components.known_sides, components.component_items

    def __enter__(self) -> None:
        components.known_sides, components.component_items = self.known, self.options

    def __exit__(self, *_: object) -> None:
        components.known_sides, components.component_items = self.sides, self.items

    def known(self, source: Source, name: str, made: Any) -> tuple[Against | None, Against | None]:
        """As `components.known_sides`."""
        b, a = self.sides(source, name, made)
        self.here.whole = None
        if a is None:
            return b, a
        drawn, rest = (one[: len(a.outside)] for one in self.found[name])
        whole = (1 - a.outside) * drawn + a.outside * rest if self.noise else 1 - a.outside + a.outside * rest
        self.here.whole = whole
        # What is missed counts `rest`, so that the component counts `whole`; noise in v counts as ever.
        return b, replace(a, share=a.outside * rest / whole, times=1.0)

    def options(self, energies: np.ndarray, shape: Any, against: Any, noise: Any, **more: Any) -> Any:
        """As `components.component_items`."""
        whole = self.here.whole
        if whole is None or noise is not None:
            return self.items(energies, shape, against, noise, **more)
        u = np.ones(len(energies)) if self.noise else 1 / whole
        return self.items(energies * whole, shape, against, (u, 1 / whole), **more)


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", type=Path)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=30)
    parser.add_argument("--shares", default="0.0625,0.03125")
    parser.add_argument("--kappas", default="1,4,16")
    options = parser.parse_args()
    adapter: LoraAdapter = load_lora(options.lora)
    known = look_for(adapter, "auto")
    if known is None:
        raise SystemExit(f"{options.lora}: its initialisation was not found")
    source = replace(measure(adapter.modules, adapter.kinds), initial=known.initial)
    table = Table("bytes", "κ", "energy lost", "KL", "retention")
    with BaseModelSession(
        Adapter.of_lora(adapter, options.lora, sha256(adapter.weights)), options.base_model
    ) as session:
        found = answers(source, moments(session, options.prompts, source.initial.modules, options.limit))  # type: ignore[union-attr]
        show_answers(found)
        rows = session.encode(Prompts.read(options.heldout, limit=options.limit)).examples
        ways: dict[str, Any] = {kappa: nullcontext() for kappa in options.kappas.split(",")}
        ways |= {"each its own": Answering(found, False), "each its own, u too": Answering(found, True)}
        for share in map(float, options.shares.split(",")):
            for name, way in ways.items():
                items.KAPPA = float(name) if name[0].isdigit() else items.KAPPA
                with way:
                    made = convert(source, Request.of(Recipe(transform="none", bytes=share), adapter))
                lost = compare(source, made.form).relative_error ** 2
                done = session.measure({"it": made.form}, rows, 8, "measuring")["it"].to_dict()
                told = (f"{share:.2%}", name, f"{lost:.3%}", f"{done['kl']:.6f}", f"{done['retention']:.3%}")
                table.add_row(*told)
                print(*told, flush=True)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
