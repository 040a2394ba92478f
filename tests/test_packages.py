"""The packages as CONTRIBUTING draws them: data flows one way, so a package imports only what stands above it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "bslora_convert"
ANYWHERE = {"errors", "extras", "notes", "version"}  # single modules that anyone may import
ORDER = (
    "results", "files", "modules", "process", "initialisation", "metric", "lora", "bslora", "layers", "serving", "recipe",
    "fit", "coding",
    "analysis", "baselines", "comparison", "conversion", "behaviour", "library", "peft", "vllm", "report", "verbs", "cli",
)  # fmt: skip
PURE = ("modules", "initialisation", "metric", "fit", "coding", "analysis")
SILENT = {"click", "rich", "safetensors", "json", "pathlib", "fsspec", "bslora_convert.files"}
OF_COMPARISONS = {"comparison", "baselines"}  # what only `compare` needs


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions and for types alone too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def own(path: Path) -> set[str]:
    """Packages of ours that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("bslora_convert.")}


def test_every_package_has_its_place() -> None:
    assert {path.parent.name for path in SOURCE.glob("*/__init__.py")} == set(ORDER)


@pytest.mark.parametrize("package", ORDER)
def test_a_package_imports_only_packages_above_it(package: str) -> None:
    above = {*ORDER[: ORDER.index(package) + 1], *ANYWHERE}
    for path in (SOURCE / package).rglob("*.py"):
        assert own(path) - above == set(), path


@pytest.mark.parametrize("package", PURE)
def test_tensor_functions_touch_no_files_and_print_nothing(package: str) -> None:
    for path in (SOURCE / package).rglob("*.py"):
        for module in imports(path):
            assert not any(module == one or module.startswith(f"{one}.") for one in SILENT), f"{path} imports {module}"


def test_rivals_are_loaded_by_comparisons_alone() -> None:
    found = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if OF_COMPARISONS & own(path) and path.relative_to(SOURCE).parts[0] not in OF_COMPARISONS
    }
    assert found == {"report/advice.py", "report/comparison.py", "verbs/compare.py"}


def test_the_map_names_every_package() -> None:
    said = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert [package for package in ORDER if f"`{package}/`" not in said] == []
