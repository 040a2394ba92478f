"""The command line as another program calls it: exit codes, JSON alone on stdout, one line for an error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bslora_convert.cli import main
from bslora_convert.modules.factors import Factors
from tests.conftest import FIXTURES
from tests.official import official
from tests.planting import random_products, write_lora
from tests.recipes import by_file


def process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bslora_convert", *map(str, arguments)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120)


def run(*arguments: str | Path, **environment: str) -> Result:
    """The same in this process: importing torch is most of what a process takes."""
    return CliRunner().invoke(main, [str(word) for word in arguments], env=environment)


def small(place: Path) -> tuple[str, str]:
    """Shared factors that fit the planted modules."""
    return by_file(place / "small.toml", shared_size=32)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(tmp_path_factory.mktemp("cli") / "lora", random_products())


def test_help_and_version_import_nothing_heavy() -> None:
    for argument in ("--help", "--version"):
        code = (
            "import sys\n"
            "from bslora_convert.cli import main\n"
            "try:\n"
            f"    main(['{argument}'])\n"
            "except SystemExit as end:\n"
            "    assert end.code == 0, end.code\n"
            "heavy = {'torch', 'numpy', 'matplotlib', 'transformers', 'peft', 'jinja2', 'rich'} & set(sys.modules)\n"
            "assert not heavy, heavy\n"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, bslora_convert; bslora_convert.Recipe(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("verb", sorted(main.commands))
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0
    lines = [line.strip() for line in result.stdout.splitlines()]
    example = lines.index("Example:")
    assert lines[example + 1].startswith(f"bslora-convert {verb} ")  # on a line of its own, to be copied
    for option in ("--json", "--quiet", "--verbose"):
        assert option in result.stdout


def test_json_stands_alone_on_stdout(lora: Path, tmp_path: Path) -> None:
    result = process("compress", lora, tmp_path / "out", "--ranks", "2,1,1", *small(tmp_path), "--json")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert record == json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert record["recipe"]["ranks"] == [2, 1, 1]
    expanded = run("expand", tmp_path / "out", tmp_path / "lora", "--rank", "3", "--json")
    assert json.loads(expanded.stdout)["ranks"]["max"] == 3
    inspected = run("inspect", tmp_path / "lora", "--json")
    assert json.loads(inspected.stdout)["kind"] == "lora"


def test_the_table_is_for_readers_and_quiet_means_quiet(lora: Path, tmp_path: Path) -> None:
    spoken = run("compress", lora, tmp_path / "a", "--transform", "none", "--budget", "0.5", COLUMNS="120")
    assert spoken.exit_code == 0
    assert "SVD, a rank per module" in spoken.stdout
    assert "Traceback" not in spoken.stderr
    silent = run("compress", lora, tmp_path / "b", "--transform", "none", "--quiet")
    assert (silent.exit_code, silent.stdout, silent.stderr) == (0, "", "")
    assert "convert" in run("inspect", lora).stdout
    verbose = run(
        "compress", lora, tmp_path / "c", "--transform", "ke", "--budget", "0.8", *small(tmp_path), "--verbose"
    )
    assert "sweep 1" in verbose.stderr


def one_line(result: Result) -> str:
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, result.stderr
    assert result.stdout == ""
    return lines[0]


def test_exit_codes(lora: Path, tmp_path: Path) -> None:
    dora = write_lora(tmp_path / "dora", random_products(layers=1), use_dora=True)
    broken = write_lora(tmp_path / "broken", random_products(layers=1))
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    out = tmp_path / "out"
    missing = run("compress", tmp_path / "nowhere", out)
    assert missing.exit_code == 2
    assert "nowhere" in one_line(missing)
    damaged = run("compress", broken, out)
    assert damaged.exit_code == 2
    assert "adapter_model.safetensors" in one_line(damaged)
    refused = run("compress", dora, out)
    assert refused.exit_code == 3
    assert "DoRA" in one_line(refused)
    unmet = run("compress", lora, out, "--transform", "none", "--max-error", "1e-7", "--dtype", "bfloat16")
    assert unmet.exit_code == 1
    assert "--dtype float32" in one_line(unmet)
    wrong = run("compress", lora, out, "--budget", "3")
    assert wrong.exit_code == 2
    assert "0 < budget <= 1" in one_line(wrong)
    both = run("compress", lora, out, "--budget", "0.5", "--ranks", "1,1,1")
    assert both.exit_code == 2
    assert "exclude each other" in one_line(both)
    assert not out.exists()
    negative = run("expand", lora, out, "--rank", "0")
    assert negative.exit_code == 2
    assert "--rank is 0" in one_line(negative)
    for usage in (
        ("compress", lora),
        ("compress", lora, out, "--ranks", "1,2"),
        ("nonsense",),
    ):
        result = run(*usage)
        assert result.exit_code == 2
        assert "Usage:" in result.stderr
    expanded = run("expand", lora, out)
    assert expanded.exit_code == 2
    assert "BSLORA" in one_line(expanded)


def test_what_gains_nothing_says_so(lora: Path, tmp_path: Path) -> None:
    larger = run("compress", lora, tmp_path / "larger", "--transform", "ke", "--ranks", "300,1,1", COLUMNS="200")
    assert larger.exit_code == 1
    assert "nothing was gained" in larger.stderr
    assert (tmp_path / "larger" / "adapter_config.json").is_file()
    nothing = run("compress", lora, tmp_path / "nothing", "--transform", "none", "--budget", "0.001")
    assert nothing.exit_code == 1
    assert "nothing was kept" in nothing.stderr
    assert "left out whole, with 100.00%" in nothing.stdout
    zero = write_lora(tmp_path / "zero", {n: Factors(0 * p.held.b, p.held.a) for n, p in random_products().items()})
    done = run("compress", zero, tmp_path / "out", "--budget", "0.5")
    assert done.exit_code == 0
    assert "zero everywhere" in done.stdout
    assert "Keeps" not in done.stdout
    least = by_file(tmp_path / "least.toml", min_shared=2)
    none = run("compress", lora, tmp_path / "none", "--transform", "none", *least)
    assert none.exit_code == 2
    assert "nothing is shared" in one_line(none)
    some = run("compress", lora, tmp_path / "some", "--transform", "none", "--budget", "0.06")
    assert some.exit_code == 0
    assert "left out whole" in some.stdout


def test_what_is_not_there_is_said_before_anything_heavy_is_imported(lora: Path, tmp_path: Path) -> None:
    prompts = FIXTURES / "word-problems.jsonl"
    out, away, full = tmp_path / "out", tmp_path / "nowhere", tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("x")
    on_base = ("--base-model", tmp_path / "no-base", "--prompts", prompts)
    for arguments, said in (
        (("inspect", away), "no such file"),
        (("analyze", away), "no such file"),
        (("compare", away), "no such file"),
        (("compress", away, out), "no such file"),
        (("compress", lora, full, "--overwrite"), "mine"),
        (("compress", lora, lora / "in"), "inside of the source"),
        (("compress", lora, out, "--finetune", prompts, "--base-model", tmp_path / "no-base"), "no such directory"),
        (("compress", lora, out, "--finetune", away, "--base-model", lora), "no such file"),
        (("expand", away, out), "no such file"),
        (("verify", lora, "--reference", lora, *on_base), "no such directory"),
        (("finetune", lora, out, "--reference", lora, *on_base), "no such directory"),
        (("finetune", lora, out, "--reference", away, *on_base), "no such file"),
        (("batch", away, out), "no such file"),
    ):
        code = (
            "import sys\n"
            "from bslora_convert.cli import main\n"
            "try:\n"
            f"    main({[str(word) for word in arguments]!r})\n"
            "except SystemExit as end:\n"
            "    assert end.code == 2, end.code\n"
            "heavy = {'torch', 'numpy', 'matplotlib', 'transformers', 'peft'} & set(sys.modules)\n"
            "assert not heavy, heavy\n"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, (arguments, result.stderr)
        assert said in result.stderr


def test_the_authors_layout_through_every_verb(tmp_path: Path) -> None:
    source = official(tmp_path / "official", "slice")
    shown = run("inspect", source, COLUMNS="120")
    assert "every module has its own copy of what is shared" in shown.stdout
    assert "copies" in shown.stdout
    compressed = run("compress", source, tmp_path / "compact", "--budget", "0.3", COLUMNS="120")
    assert compressed.exit_code == 0, compressed.stderr
    assert "Nothing was fitted" in compressed.stdout
    assert "without effect: --budget" in compressed.stderr
    back = run("expand", tmp_path / "compact", tmp_path / "again", "--format", "official", COLUMNS="120")
    assert "ranks 2,4,8" in back.stdout
    weights = [(directory / "adapter_model.safetensors").stat().st_size for directory in (source, tmp_path / "again")]
    assert weights[0] == weights[1]
    expanded = run("expand", source, tmp_path / "lora", "--json")
    assert json.loads(expanded.stdout)["ranks"] == {"min": 14, "max": 14}
    refused = run("expand", source, tmp_path / "other", "--format", "official", "--rank", "2")
    assert refused.exit_code == 2
    assert "only a LoRA" in one_line(refused)


def test_a_full_output_is_refused_without_overwrite(lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    refused = run("compress", lora, out, "--transform", "none")
    assert refused.exit_code == 2
    assert "--overwrite" in one_line(refused)
    assert (out / "precious").exists()
    foreign = run("compress", lora, out, "--transform", "none", "--overwrite")
    assert foreign.exit_code == 2
    assert "precious" in one_line(foreign)
    assert (out / "precious").read_text() == "x"
    (out / "precious").unlink()
    for _ in range(2):  # its own result is replaced
        assert run("compress", lora, out, "--transform", "none", "--overwrite").exit_code == 0


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = process("inspect", tmp_path / "nowhere", "--debug")
    assert result.returncode != 0
    assert "Traceback" in result.stderr


@pytest.mark.slow
def test_the_python_api_is_functions_whatever_was_imported_before() -> None:
    code = (
        "import bslora_convert.verbs.compress, bslora_convert.verbs.expand, bslora_convert.verbs.inspect, bslora_convert.recipe\n"
        "import bslora_convert\n"
        "from bslora_convert import Recipe, compress, expand, inspect, load_compact, load_lora, save_compact\n"
        "for name in bslora_convert.__all__:\n"
        "    value = getattr(bslora_convert, name)\n"
        "    assert callable(value) or name == '__version__', name\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("verb", ["compress", "inspect", "analyze", "compare", "batch"])
def test_a_scaling_that_the_file_lacks_can_be_given(tmp_path: Path, verb: str) -> None:
    lora = write_lora(tmp_path / "library" / "lora", random_products(rank=2))
    path = lora / "adapter_config.json"
    path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "lora_alpha"})
    )
    arguments = {
        "compress": [str(lora), str(tmp_path / "out"), "--transform", "none", "--no-report-html"],
        "inspect": [str(lora)],
        "analyze": [str(lora), "--draws", "2"],
        "compare": [str(lora), "--budgets", "0.5", "--forms", "svd_adaptive"],
        "batch": [str(lora.parent), str(tmp_path / "out"), "--transform", "none", "--workers", "0", "--no-report-html"],
    }[verb]
    refused = run(verb, *arguments)
    assert refused.exit_code != 0
    assert "lora_alpha is missing" in refused.output + refused.stderr
    given = run(verb, *arguments, "--lora-alpha", "4", *(["--retry-failed"] if verb == "batch" else []))
    assert given.exit_code == 0, given.output + given.stderr
