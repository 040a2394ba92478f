"""What README and docs/ tell a reader to type: it runs as written, on the fixtures under the names that the pages use."""

import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from _pytest.mark import ParameterSet
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from bslora_convert import Recipe, batch, compress
from bslora_convert.bslora.storage import WEIGHTS_NAME
from bslora_convert.cli import main
from tests.conftest import FIXTURES

ROOT = FIXTURES.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TINY = FIXTURES / "tiny"
ROWS = 12  # of a prompt file
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")

# Where the place of a verb's result stands among its words.
PLACE = {"compress": 1, "expand": 1, "finetune": 1, "batch": 1}
# Read and not run: another machine's store, and Ray, which tests/library runs.
ELSEWHERE = ("s3://", "--engine ray")
LONG = ("analyze", "batch", "compare", "finetune")


def fenced(page: Path, language: str) -> Iterator[str]:
    for kind, text in FENCE.findall(page.read_text(encoding="utf-8")):
        if kind == language:
            yield text


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command of ours in a page's blocks, comments taken off and broken lines joined."""
    for text in fenced(page, ""):
        for line in text.replace("\\\n", " ").splitlines():
            if line.startswith("bslora-convert "):
                yield shlex.split(line, comments=True)[1:]


def spans(page: Path, start: str) -> Iterator[str]:
    """Code within sentences that begins with some word, its own line breaks taken out."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    yield from (" ".join(span.split()) for span in SPAN.findall(prose) if span.startswith(start))


TYPED = [*{tuple(words): (page, words) for page in PAGES for words in commands(page)}.values()]  # each once


def shape_of(words: list[str]) -> tuple[str, ...]:
    """The verb and its options without their values: of commands alike one is run."""
    return words[0], *sorted(word for word in words if word.startswith("--"))


def runs() -> Iterator[ParameterSet]:
    """A command of each shape, the first there is; of verbs that take long one shape is tried always, the others are slow."""
    shapes, verbs = set(), set()
    for page, words in TYPED:
        if shape_of(words) in shapes or any(mark in " ".join(words) for mark in ELSEWHERE):
            continue
        again = words[0] in LONG and words[0] in verbs
        yield pytest.param(page, words, marks=pytest.mark.slow if again else ())
        shapes.add(shape_of(words))
        verbs.add(words[0])


RUN = [*runs()]


def label(value: object) -> str:
    return value.name if isinstance(value, Path) else " ".join(value) if isinstance(value, list) else str(value)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds what the pages speak of."""
    place = tmp_path_factory.mktemp("pages")
    for source, name in (
        ("gsm8k", "my-lora"), ("gsm8k", "adapters/tenant-3/support"), ("banking77", "another-lora"),
        ("banking77", "adapters/tenant-4"), ("gsm8k", "my-lora-v1"), ("gsm8k", "my-lora-v2"),
    ):  # fmt: skip
        cut(TINY / source, place / name)
    shutil.copytree(TINY / "base", place / "base")
    rows = (TINY / "gsm8k-heldout.jsonl").read_text().splitlines()
    for number, name in enumerate(("prompts", "train", "held-out")):
        (place / f"{name}.jsonl").write_text("\n".join(rows[number * ROWS : (number + 1) * ROWS]) + "\n")
    (place / "list.jsonl").write_text('{"id": "one", "uri": "my-lora"}\n')
    for source, out in (("my-lora", "my-compact"), ("another-lora", "another-compact")):
        compress(place / source, place / out, Recipe(transform="ke", budget=0.5, shared_size=32))
    batch(place / "adapters", place / "compact", Recipe(transform="none"), workers=0)
    (place / "fixtures").symlink_to(FIXTURES)
    return place


def cut(source: Path, out: Path) -> None:
    """An adapter of the two smallest kinds of module alone: all that these commands need."""
    shutil.copytree(source, out)
    kept = {k: t for k, t in load_file(out / WEIGHTS_NAME).items() if "q_proj" in k or "v_proj" in k}
    save_file(kept, out / WEIGHTS_NAME)


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_the_pages_hold_commands() -> None:
    assert len(RUN) > 25
    assert {run.values[1][0] for run in RUN if not run.marks} == set(main.commands)  # type: ignore[index]


def test_every_command_of_a_block_is_one(place: Path) -> None:
    for _, words in TYPED:
        parsed(words)


@pytest.mark.parametrize(("page", "words"), RUN, ids=label)
def test_a_command_of_each_shape_runs_as_written(page: Path, words: list[str], place: Path) -> None:
    if "build/small" in words and words[0] == "verify":
        compress(place / "my-lora", place / "build" / "small", Recipe(transform="none"))
    plain = [word.replace("fixtures/smollm2-135m-math-r16", "my-lora").replace("build/base", "base") for word in words]
    out = result_of(plain)
    if out is not None:
        shutil.rmtree(out, ignore_errors=True)
    done = CliRunner().invoke(main, plain)
    # A threshold may be missed by these fixtures: what counts is that it was measured.
    assert done.exit_code == 0 or (done.exit_code == 1 and "missed: " in done.stderr), done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert out is None or "--dry-run" in plain or any(out.iterdir())


def result_of(words: list[str]) -> Path | None:
    if "--out" in words:
        return Path(words[words.index("--out") + 1])
    given = [word for word in words[1:] if not word.startswith("--")]
    at = PLACE.get(words[0])
    return None if at is None or "--resume" in words else Path(given[at])


def parsed(words: list[str]) -> None:
    command = main.commands[words[0]]
    try:
        command.make_context(words[0], list(words[1:]))
    except click.UsageError as error:
        raise AssertionError(f"{' '.join(words)}: {error.format_message()}") from None


def test_every_command_within_a_sentence_is_one(place: Path) -> None:
    seen = 0
    for page in PAGES:
        for span in spans(page, "bslora-convert "):
            words = shlex.split(span)[1:]
            if len(words) > 1 and "…" not in span:
                parsed(words)
                seen += 1
    assert seen > 5


@pytest.mark.parametrize("proved", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_calls_of_the_first_table_run_one_after_another(place: Path, proved: bool) -> None:
    """The one that proves a behaviour takes as long as all others, and tests/behaviour asks for one too."""
    calls = [span for span in spans(ROOT / "README.md", "bslora-convert ") if " build/" in span]
    assert len(calls) == 4
    for call in (call for call in calls if ("--min-retention" in call) == proved):
        words = call.replace("fixtures/smollm2-135m-math-r16", "my-lora").split()[1:]
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, done.output


def test_what_is_installed_can_be() -> None:
    """The project is on no index: its extras are named behind a directory or a file."""
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    texts = {path: path.read_text(encoding="utf-8") for path in (*PAGES, *(ROOT / "bslora_convert").rglob("*.py"))}
    for path, text in texts.items():
        assert not re.search(r"pip install\b[^`\n]*[\s'\"]bslora-convert\b", text), path
        for named in re.findall(r"'[^'\s]*(?:\.|\.whl)\[([\w,]+)\]'", text):
            assert set(named.split(",")) <= extras, f"{path}: {named}"


def test_every_benchmark_that_is_named_takes_its_options() -> None:
    seen = 0
    for page in PAGES:
        for span in spans(page, "python benchmarks/"):
            script, *words = shlex.split(span.removeprefix("python "))
            text = (ROOT / script).read_text(encoding="utf-8")
            for word in words:
                assert not word.startswith("--") or f'"{word}"' in text, f"{page.name}: {script} takes no {word}"
            seen += 1
    assert seen > 8


def test_every_target_of_make_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {word for page in PAGES for word in re.findall(r"^make ([a-z-]+)", page.read_text(), re.M)}
    assert named
    assert named <= targets


@pytest.mark.parametrize("page", [page for page in PAGES if any(fenced(page, "python"))], ids=label)
def test_the_python_of_a_page_runs(page: Path, place: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained("base")
    names = {"base": base, "model": base, "ids": torch.arange(12).view(3, 4)}
    for text in fenced(page, "python"):
        shutil.rmtree("for-the-server", ignore_errors=True)
        if "compress(" in text:
            shutil.rmtree("my-compact")
        if "load_into" in text:
            names["model"] = AutoModelForCausalLM.from_pretrained("base")
        exec(compile(text, page.name, "exec"), names)


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_file_that_a_page_names_is_there() -> None:
    for page in PAGES:
        for name in re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)", page.read_text(encoding="utf-8")):
            assert (ROOT / name).exists() or (ROOT / "bslora_convert" / name).exists(), f"{page.name} names {name}"
