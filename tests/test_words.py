"""What the command line says: paths letter by letter, options by their names, lines that stay whole, nothing of the libraries."""

import json
import logging
import os
import pickle
import subprocess
import sys
import time
import warnings
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals

import click
import pytest
from _pytest.mark import ParameterSet
from click.testing import CliRunner, Result

from bslora_convert import Recipe, Training
from bslora_convert.cli import main
from bslora_convert.cli.words import unreachable, words
from bslora_convert.errors import RecipeError
from bslora_convert.process.quiet import libraries_quiet, quiet_as_the_parent
from bslora_convert.recipe.verifying import VerifyOptions
from bslora_convert.results.behaviour import Verification
from tests.conftest import FIXTURES
from tests.planting import random_products, write_lora
from tests.records import blank

ODD = [
    "[red]mk",
    "x[/red]",
    "a[bold]b[/]",
    ":smile: [link=x]",
    "`tick` ```",
    "<script>$x$_|</script>",
]
TINY = FIXTURES / "tiny"


def run(*arguments: str | Path, **environment: str) -> Result:
    return CliRunner().invoke(main, [str(word) for word in arguments], env=environment)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(tmp_path_factory.mktemp("words") / "lora", random_products(layers=1))


def shown(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


@pytest.mark.parametrize(
    "name", [ODD[0], *(pytest.param(name, marks=pytest.mark.slow) for name in ODD[1:4]), *ODD[4:]], ids=range(len(ODD))
)
def test_paths_are_printed_letter_by_letter_by_every_verb(tmp_path: Path, name: str) -> None:
    name = name.replace("/", "∕") if "script" in name else name
    source = write_lora(tmp_path / name, random_products(layers=1))
    outs = {verb: tmp_path / f"{verb} {name}" for verb in ("compress", "expand", "analyze", "compare", "batch")}
    calls = {
        "compress": (source, outs["compress"], "--transform", "none"),
        "inspect": (source,),
        "expand": (outs["compress"], outs["expand"]),
        "analyze": (source, "--out", outs["analyze"], "--draws", "2"),
        "compare": (source, "--out", outs["compare"], "--budgets", "0.5", "--forms", "svd_adaptive"),
        "batch": (tmp_path / name, outs["batch"], "--workers", "0", "--transform", "none"),
        "capacity": (outs["batch"], "--gpu-gib", "80", "--base-gib", "20"),
    }
    for verb, arguments in calls.items():
        done = run(verb, *arguments)
        assert done.exit_code == 0, (verb, done.stderr, done.exception)
        if verb != "capacity":
            assert shown(str(outs.get(verb, source))) in done.stdout, verb
    missing = run("inspect", tmp_path / "gone" / name)
    assert shown(str(tmp_path / "gone" / name)) in missing.stderr
    card = (outs["compress"] / "README.md").read_text(encoding="utf-8")
    fences = [line for line in card.splitlines() if line and not line.strip("`")]
    assert len(fences) == 7  # the end of the block in Python among them
    assert fences[0] == fences[1]
    assert "<script>" not in (outs["compress"] / "report.html").read_text(encoding="utf-8").partition("</head>")[2]


def test_a_path_that_is_no_utf8_ends_in_words_too(lora: Path, tmp_path: Path) -> None:
    """The library that writes tensors takes none; what it can't do is said, and what is shown is shown by numbers."""
    name = os.fsdecode(b"b\xff")
    for arguments in (("inspect", tmp_path / name), ("compress", lora, tmp_path / name, "--transform", "none")):
        done = run(*arguments)
        assert done.exit_code == 2
        assert "internal error" not in done.stderr
    done = run("analyze", lora, "--out", tmp_path / name, "--draws", "2")
    assert done.exit_code == 0, done.stderr
    assert shown(str(tmp_path / name)) in done.stdout


def test_notes_in_the_card_are_not_markdown() -> None:
    from bslora_convert.report.environment import environment, plain

    assert plain("rows of a_b*c`[x](y)|\n# <b>") == r"rows of a\_b\*c\`\[x\](y)\| \# \<b\>"
    capital = environment().from_string("{{ note | sentence }}").render(note="rows of My.JSONL were cut")
    assert capital == "Rows of My.JSONL were cut"


def test_piped_lines_stay_whole(lora: Path, tmp_path: Path) -> None:
    deep = tmp_path / ("long" * 40) / ("longer" * 30)
    done = run("compress", lora, deep, "--transform", "none", COLUMNS="60")
    lines = done.stdout.splitlines()
    assert any(line.endswith(f"Written to {deep}") for line in lines)
    assert lines[0] == f"none of {lora}"
    compared = run("compare", lora, "--budgets", "0.5", "--forms", "vera,vb_lora,svd_adaptive")
    header = next(line for line in compared.stdout.splitlines() if "settings and notes" in line)
    rows = [line for line in compared.stdout.splitlines() if "50.00%" in line and line.startswith("│")]
    assert len(rows) == 3
    assert {len(row) for row in rows} == {len(header)}


def test_a_screen_has_the_width_that_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from bslora_convert.cli import screen

    class Terminal:
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            return len(text)

    monkeypatch.setenv("COLUMNS", "77")
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert screen.console().width == 77


# ---------------------------------------------------------------------------------------------- options by name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("compress", "--max-error", "2"), "--max-error is 2.0"),
        (("compress", "--budget", "0.5", "--max-error", "0.1"), "--max-error and --budget exclude each other"),
        (("compress", "--ranks", "0,0,0"), "--ranks is 0,0,0"),
        (("compress", "--prompts", "x"), "--prompts needs the base model: give --base-model"),
        (("compress", "--metric", "two-sided"), "--metric is 'two-sided': it needs --prompts"),
        (("compress", "--device", "tpu"), "--device is 'tpu'"),
        (("compress", "--max-minutes", "-1"), "--max-minutes is -1.0"),
        (("compress", "--max-steps", "4"), "give --finetune and --base-model"),
        (("compress", "--bytes", "0.0001"), "--bytes: 3 of the source"),
        (("batch", "--max-failures", "0"), "--max-failures is 0"),
        (("batch", "--shard", "3/2"), "--shard is 3/2"),
        (("batch", "--workers", "-1"), "--workers is -1"),
        (("analyze", "--draws", "1"), "--draws is 1"),
        (("analyze", "--base-model", "x"), "--base-model and --prompts are given together"),
        (("compare", "--budgets", "2"), "--budgets holds 2.0"),
        (("compare", "--forms", "nonsense"), "--forms: nonsense unknown"),
        (("compare", "--save"), "--save needs an output directory: give --out"),
        (("expand", "--rank", "2", "--format", "official"), "--rank is 2: only a LoRA can be re-truncated"),
    ],
)
def test_errors_name_options_as_the_command_line_does(
    lora: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    verb, *options = arguments
    places = (lora, tmp_path / "out") if verb in ("compress", "batch", "expand") else (lora,)
    done = run(verb, *places, *options)
    assert done.exit_code == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_python_keeps_the_names_of_its_fields() -> None:
    for call, said in (
        (lambda: Recipe(max_error=2.0), "max_error is 2.0"),
        (lambda: Training(batch_size=0), "batch_size is 0"),
        (lambda: VerifyOptions(min_agreement=3.0), "min_agreement is 3.0"),
    ):
        with pytest.raises(RecipeError, match=said) as caught:
            call()
        assert words(caught.value) == str(caught.value)  # no command is running
        again = pickle.loads(pickle.dumps(caught.value))
        assert (str(again), again.fields) == (str(caught.value), caught.value.fields)


def test_thresholds_are_named_as_options(lora: Path) -> None:
    arguments = ["--reference", str(TINY / "banking77"), "--base-model", str(TINY / "base"), "--min-agreement", "3"]
    done = run("verify", TINY / "banking77", *arguments, "--prompts", TINY / "banking77-heldout.jsonl")
    assert done.exit_code == 2
    assert "--min-agreement is 3.0" in done.stderr
    done = run("verify", TINY / "banking77", *arguments[:4], "--limit", "0", "--tasks", "x")
    assert "--limit is 0" in done.stderr


def test_a_name_is_translated_once_and_as_a_word() -> None:
    @click.command()
    @click.option("--max-error")
    def command(**_: object) -> None:
        error = RecipeError("max_error is 2: 0 < max_error < 1, not_max_error", "max_error")
        click.echo(words(error))

    assert CliRunner().invoke(command).output == "--max-error is 2: 0 < max_error < 1, not_max_error\n"


# ---------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("verb", ["batch", "compress", "inspect", "expand", "analyze", "compare"])
def test_a_hub_that_cannot_be_reached_is_one_line(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    places = [tmp_path / "out"] if verb in ("batch", "compress", "expand") else []
    began = time.monotonic()
    done = run(verb, "hf://nobody/nothing", *places)
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert "internal error" not in done.stderr
    assert "nobody/nothing" in done.stderr
    assert time.monotonic() - began < 30


def test_errors_of_the_network_are_known_by_their_kind() -> None:
    httpx = pytest.importorskip("httpx2")
    from huggingface_hub.errors import RepositoryNotFoundError

    request = httpx.Request("GET", "https://huggingface.co")
    for error in (
        httpx.ConnectError("no route", request=request),
        httpx.ReadTimeout("too slow", request=request),
        RepositoryNotFoundError("404", response=httpx.Response(404, request=request)),
        ConnectionRefusedError(111, "Connection refused"),
    ):
        assert unreachable(error) is not None
        wrapped = RuntimeError("wrapped")
        wrapped.__cause__ = error
        assert unreachable(wrapped) is not None
    assert unreachable(ValueError("no")) is None
    assert unreachable(FileNotFoundError(2, "No such file")) is None


# ---------------------------------------------------------------------------------------------- libraries and interrupts


def test_libraries_keep_their_words_to_themselves(capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.root.manager.disable
    with libraries_quiet():
        logging.getLogger("matplotlib.font_manager").warning("Matplotlib is building the font cache")
        logging.getLogger("lm_eval").error("a task")
        warnings.warn("old", UserWarning, stacklevel=1)
    assert logging.root.manager.disable == before
    quiet_as_the_parent()  # as a worker does, which has the environment and nothing else
    logging.getLogger("matplotlib.font_manager").warning("Matplotlib is building the font cache")
    logging.disable(before)
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.slow
def test_the_harness_draws_no_bars_unless_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    words = [
        "verify", TINY / "banking77", "--reference", TINY / "banking77", "--base-model", TINY / "base", "--limit", "1",
        "--tasks", "local_piqa", "--task-data", FIXTURES / "tasks", "--out", tmp_path / "verify.json",
    ]  # fmt: skip
    quiet = run(*words, "--json")
    assert quiet.exit_code == 0, quiet.stderr
    assert json.loads(quiet.stdout)["tasks"]["local_piqa"]["items"] == 1
    assert {line.partition(":")[0] for line in quiet.stderr.splitlines()} <= {"note", "verify"}
    assert "loglikelihood" in run(*words, "--verbose").stderr
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.slow
def test_a_fresh_font_cache_is_not_spoken_of(lora: Path, tmp_path: Path) -> None:
    """Workers of a batch draw too, each a process of its own."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(tmp_path / "fonts"), "HOME": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "bslora_convert",
        "batch",
        str(lora),
        str(tmp_path / "out"),
        "--workers",
        "1",
        "-q",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "fonts").is_dir()


STARTED = (
    "import sys; sys.argv = ['bslora-convert', 'analyze', {lora!r}, '--draws', '64']\n"
    "from bslora_convert.__main__ import main; sys.stdout.write('.'); sys.stdout.flush(); main()"
)


def later(*delays: float) -> list[ParameterSet]:
    """Moments between those that are always tried."""
    return [pytest.param(delay, sign, marks=pytest.mark.slow) for delay in delays for sign in (SIGINT, SIGTERM)]


@pytest.mark.parametrize(
    ("delay", "sign"), [(0.05, SIGINT), (0.1, SIGTERM), (1.2, SIGINT), *later(0.02, 0.2, 0.3, 0.6, 2.0)]
)
def test_an_early_interrupt_is_one_line(lora: Path, delay: float, sign: Signals) -> None:
    ended(STARTED.format(lora=str(lora)), sign, delay)


def ended(code: str, sign: Signals, delay: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=0
    )
    assert process.stdout is not None
    assert process.stdout.read(1) == "."
    time.sleep(delay)
    process.send_signal(sign)
    _, stderr = process.communicate(timeout=60)
    *before, last = stderr.splitlines()
    assert (process.returncode, last) == (130, "error: interrupted; nothing was written")
    assert all(line.startswith("analyze: ") for line in before)  # where it was, on a slow machine


def test_the_installed_command_begins_where_the_module_does() -> None:
    import tomllib

    scripts = tomllib.loads((FIXTURES.parent / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"bslora-convert": "bslora_convert.__main__:main"}


def test_few_items_are_called_few() -> None:
    from bslora_convert.report.functional import with_functional
    from bslora_convert.report.verdict import behaviour

    task = {
        "metric": "acc",
        "items": 4,
        "base": 0.0,
        "reference": 1.0,
        "compact": 1.0,
        "difference_ci95": [-0.75, 0.75],
    }
    record = blank(Verification, tasks={"t": task})
    assert behaviour(record) == ["t: 100.0% against 100.0%, over 4 items, too few to tell."]
    page = with_functional("<!-- functional --><!-- /functional -->", record)
    assert "-0.7500 to +0.7500 (too few items)" in page
    record = blank(Verification, tasks={"t": {**task, "items": 400}})
    assert behaviour(record) == ["t: 100.0% against 100.0%, no difference can be seen."]


def test_what_cannot_be_reached_is_named() -> None:
    @click.command()
    @click.argument("source", type=click.Path(path_type=Path))
    def command(source: Path) -> None:
        click.echo(unreachable(ConnectionError()) or unreachable(_gaierror()))

    said = CliRunner().invoke(command, ["hf://nobody/nothing"]).output
    assert said.startswith("hf://nobody/nothing can't be reached (")


def _gaierror() -> OSError:
    import socket

    return socket.gaierror(-2, "Name or service not known")
