"""Adapters that take bases from a library: what is read is what was put together, and nothing hostile gets through."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bslora_convert.bslora.bases import DIRECTORY, Basis, Cores, Sizes, Uses, named_tensors
from bslora_convert.bslora.form import BsloraForm, Module
from bslora_convert.bslora.storage import load_compact, save_compact
from bslora_convert.errors import InputError
from bslora_convert.files.address import resolve
from bslora_convert.files.hashing import sha256

SHAPE = (6, 5)
NAMES = ("both", "left", "right")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def land(library: Path, tensors: dict[str, torch.Tensor]) -> str:
    place = library / DIRECTORY
    place.mkdir(parents=True, exist_ok=True)
    save_file(tensors, place / "new")
    digest = sha256(place / "new")
    (place / "new").rename(place / f"{digest}.safetensors")
    return digest


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A library with one adapter `tenant/a`, whose modules are on bases of both sides, of the left and of the right."""
    bases = {
        "both": Basis(random(6, 3), random(2, 5)), "left": Basis(random(6, 2), None), "right": Basis(None, random(2, 5)),
    }  # fmt: skip
    file = land(tmp_path / "library", named_tensors(bases))
    cores = {name: random(*basis.sizes.core(SHAPE)) for name, basis in bases.items()}
    modules = {name: Module(SHAPE, bases[name].with_core(core, bases[name].sizes.rank)) for name, core in cores.items()}
    directory = tmp_path / "library" / "tenant" / "a"
    directory.mkdir(parents=True)
    uses = Uses(file, {name: basis.sizes for name, basis in bases.items()})
    save_compact(BsloraForm(None, modules), directory, {"base_model_name_or_path": "b"}, {}, cores=Cores(uses, cores))
    return tmp_path / "library"


def test_local_parts_are_put_together(library: Path) -> None:
    adapter = load_compact(f"{library}::tenant/a")
    stored = load_file(library / "tenant" / "a" / WEIGHTS)
    assert {key.rpartition("_")[2] for key in stored} == {"A", "B", "C"}
    assert adapter.parameters == sum(tensor.numel() for tensor in stored.values()) == 3 * 2 + 2 * 5 + 6 * 2
    assert adapter.bases_parameters == 6 * 3 + 2 * 5 + 6 * 2 + 2 * 5
    bases = load_file(next((library / DIRECTORY).iterdir()))
    delta = adapter.form.delta("both")
    exact = bases["both.left"] @ stored["base_model.model.both.bslora_local_C"] @ bases["both.right"]
    assert delta.rank == 2
    assert torch.allclose(delta.b @ delta.a, exact, atol=1e-5)
    assert load_compact(library / "tenant" / "a").uses == adapter.uses
    shutil.copytree(library, library.parent / "moved")
    assert load_compact(library.parent / "moved" / "tenant" / "a").uses == adapter.uses


def edit(change: Callable[[dict], None]) -> Callable[[Path], None]:  # type: ignore[type-arg]
    def apply(library: Path) -> None:
        path = library / "tenant" / "a" / CONFIG
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return apply


def spoil(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """Another file of bases with a right name, which the adapter is made to name."""

    def apply(library: Path) -> None:
        tensors = load_file(next((library / DIRECTORY).iterdir()))
        change(tensors)
        edit(lambda config: config.update(bases=land(library, tensors)))(library)

    return apply


def flip(library: Path) -> None:
    path = next((library / DIRECTORY).iterdir())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda library: shutil.rmtree(library / DIRECTORY), "needs .bases/"),
    "changed": (flip, "not that of its name"),
    "no hash": (edit(lambda c: c.update(bases="../../etc/passwd")), "a SHA-256"),
    "upper case": (edit(lambda c: c.update(bases=c["bases"].upper())), "a SHA-256"),
    "no text": (edit(lambda c: c.update(bases=7)), "a SHA-256"),
    "old version": (edit(lambda c: c.update(format_version=1)), "format_version 1"),
    "no bases": (edit(lambda c: c.pop("bases")), "a SHA-256"),
    "unknown version": (edit(lambda c: c.update(format_version=4)), "format_version is 4"),
    "truth": (edit(lambda c: c.update(format_version=True)), "format_version is True"),
    "negative": (edit(lambda c: c["modules"]["both"].update(basis={"left": -3})), "positive whole"),
    "truths": (edit(lambda c: c["modules"]["both"].update(basis={"left": True})), "positive whole"),
    "huge": (edit(lambda c: c["modules"]["both"].update(basis={"left": 1 << 40})), "positive whole"),
    "other side": (edit(lambda c: c["modules"]["both"].update(basis={"up": 3})), "left or right"),
    "other rank": (edit(lambda c: c["modules"]["both"].update(rank=5)), "rank 5"),
    "other core": (edit(lambda c: c["modules"]["both"].update(basis={"left": 4, "right": 2})), "has shape"),
    "no module": (edit(lambda c: [m.pop("basis") for m in c["modules"].values()]), "no module has a basis"),
    "basis missing": (spoil(lambda t: t.pop("both.left")), "both.left is missing"),
    "basis of a shape": (spoil(lambda t: t.update({"both.left": torch.ones(6, 4)})), "has shape"),
    "not finite": (spoil(lambda t: t["right.right"].fill_(float("nan"))), "NaN"),
    "other type": (spoil(lambda t: t.update({"both.left": t["both.left"].half()})), "float16"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(library: Path, name: str) -> None:
    change, words = HOSTILE[name]
    change(library)
    with pytest.raises(InputError, match=words):
        load_compact(f"{library}::tenant/a")


def test_an_adapter_without_its_library_says_what_it_needs(library: Path) -> None:
    shutil.copytree(library / "tenant" / "a", library.parent / "alone")
    with pytest.raises(InputError, match="of the library that it was made in"):
        load_compact(library.parent / "alone")


def test_addresses(library: Path) -> None:
    assert resolve(f"{library}::tenant/a") == library / "tenant" / "a"
    assert resolve(library / "tenant" / "a") == library / "tenant" / "a"
    odd = library.parent / "x::y"
    odd.mkdir()
    assert resolve(odd) == odd
    for bad in ("../library/tenant/a", "/etc", "tenant/../tenant/a", ".bases", "", "a b", "summary.json", "x" * 300):
        with pytest.raises(InputError, match="id "):
            resolve(f"{library}::{bad}")
    with pytest.raises(InputError, match="is no directory"):
        resolve(f"{library}/none::tenant/a")


def test_an_update_of_lower_rank_comes_out_with_that_rank() -> None:
    basis = Basis(random(6, 4), random(4, 5))
    core = random(4, 2) @ random(2, 4)
    local = basis.with_core(core, 2)
    assert basis.left is not None and basis.right is not None
    assert (local.rank, basis.sizes_for(2).rank, basis.sizes_for(9).rank) == (2, 2, 4)
    assert torch.allclose(local.b @ local.a, basis.left @ core @ basis.right, atol=1e-4)


def test_sizes() -> None:
    assert (Sizes.of(3, 2).factor, Sizes.of(3).factor, Sizes.of(0, 2).factor) == ("C", "A", "B")
    assert (Sizes.of(3, 2).rank, Sizes.of(3).rank, Sizes.of(0, 2).rank) == (2, 3, 2)
    assert (Sizes.of(3, 2).core(SHAPE), Sizes.of(3).core(SHAPE), Sizes.of(0, 2).core(SHAPE)) == ((3, 2), (3, 5), (6, 2))
