"""The house as CONTRIBUTING draws it: data flows one way, so rooms import only what stands above them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bslora_convert"
ROOT = {"errors", "extras", "notes", "results", "version"}  # anyone may ask for these
ORDER = (
    "files", "modules", "process", "metric", "lora", "bslora", "layers", "serving", "recipe", "fit", "coding", "analysis",
    "baselines", "comparison", "conversion", "behaviour", "peft", "vllm", "report", "library", "verbs", "cli",
)  # fmt: skip
PURE = ("modules", "metric", "fit", "coding", "analysis")
SILENT = {"click", "rich", "safetensors", "json", "pathlib", "fsspec", "bslora_convert.files"}


def imports(room: str) -> Iterator[tuple[Path, str]]:
    """(file, imported module) of every import of a room, inside functions too; what only types need is left out."""
    for path in sorted((PACKAGE / room).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        typing = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if id(node) in typing:
                continue
            if isinstance(node, ast.ImportFrom) and node.module:
                yield path.relative_to(PACKAGE), node.module
            elif isinstance(node, ast.Import):
                yield from ((path.relative_to(PACKAGE), alias.name) for alias in node.names)


def test_every_room_has_its_place() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_a_room_imports_only_rooms_above_it(room: str) -> None:
    above = ORDER[: ORDER.index(room) + 1]
    for path, module in imports(room):
        top, _, rest = module.partition(".")
        if top == "bslora_convert":
            asked = rest.partition(".")[0]
            assert asked in above or asked in ROOT or not asked, f"{path} imports {module}"


@pytest.mark.parametrize("room", PURE)
def test_tensor_functions_touch_no_files_and_print_nothing(room: str) -> None:
    for path, module in imports(room):
        assert not any(module == one or module.startswith(f"{one}.") for one in SILENT), f"{path} imports {module}"


def test_the_map_names_every_room() -> None:
    said = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert [room for room in ORDER if f"`{room}/`" not in said] == []
