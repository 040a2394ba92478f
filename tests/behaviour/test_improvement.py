"""Evidence and distillation on the tiny model: the moments are the inputs', training helps, stops, resumes and never hurts."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bslora_convert import Recipe, Training, compress, finetune, load_compact
from bslora_convert.behaviour.adapter import read_adapter
from bslora_convert.behaviour.attach import Attached
from bslora_convert.behaviour.calibrate import collect
from bslora_convert.behaviour.distill import Distilled, distill
from bslora_convert.behaviour.divergence import kl_sums
from bslora_convert.behaviour.prompts import Example, Prompts, read_prompts
from bslora_convert.behaviour.session import BaseModelSession
from bslora_convert.behaviour.split import split
from bslora_convert.behaviour.student import Student
from bslora_convert.behaviour.training_rows import TrainingRows, TrainingRun, split_heldout
from bslora_convert.behaviour.writing import Writing
from bslora_convert.bslora.codes.file import WIDTHS_NAME
from bslora_convert.bslora.codes.widths import WIDTHS
from bslora_convert.bslora.form import BsloraForm
from bslora_convert.bslora.tensors import named_tensors
from bslora_convert.cli import main
from bslora_convert.conversion.request import Converted
from bslora_convert.errors import InputError, RecipeError
from bslora_convert.metric.metric import Metric
from tests.behaviour.conftest import BASE, LORA, PROMPTS, TINY
from tests.conftest import FIXTURES
from tests.planting import drawn_lora
from tests.recipes import by_file

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def examples(session: BaseModelSession) -> list[Example]:
    return list(session.encode(Prompts.read(PROMPTS)).examples)


@pytest.fixture(scope="module")
def compact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compact") / "ke"
    compress(LORA, out, Recipe(transform="ke", budget=0.2, shared_size=32), report_html=False)
    return out


def trained(
    session: BaseModelSession,
    form: BsloraForm,
    train: Sequence[Example],
    held: Sequence[Example],
    training: Training,
    began: float | None = None,
) -> Distilled:
    run = TrainingRun(training, Path("nowhere"), time.perf_counter() if began is None else began)
    return distill(session, Converted(form), TrainingRows(train, held), run)


# ---------------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("metric", ["input", "two-sided"])
def test_moments_are_those_of_the_modules_inputs_and_gradients(
    session: BaseModelSession, examples: list[Example], metric: str
) -> None:
    some, name = examples[:5], "model.layers.1.mlp.up_proj"
    factors = {name: session.adapter.form.modules[name].local}
    found = collect(session.base, session.reference, factors, some, 3, metric == "two-sided")[name]
    layer = session.base.model.get_submodule(name)
    inputs: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    for example in some:  # one by one, without padding

        def watch(_: Any, args: Any, output: torch.Tensor) -> None:
            inputs.append(args[0][0].double())
            output.requires_grad_()
            output.register_hook(lambda g: gradients.append(g[0].double()))

        handle = layer.register_forward_hook(watch)
        with session.reference:
            logits = session.base.model(input_ids=torch.tensor([example.ids])).logits[0]
        handle.remove()
        wanted = torch.tensor(example.ids[example.start :])
        torch.nn.functional.cross_entropy(logits[example.start - 1 : -1], wanted, reduction="sum").backward()
    x, g = torch.cat(inputs), torch.cat(gradients)
    z = x @ factors[name].a.double().T
    torch.testing.assert_close(found.inputs, z.T @ z / len(z), rtol=1e-4, atol=1e-5)
    if metric == "input":
        assert found.outputs is None
    else:
        assert found.outputs is not None
        w = g @ factors[name].b.double()
        torch.testing.assert_close(found.outputs, w.T @ w / len(w), rtol=1e-3, atol=1e-8)
        power = x.square().sum(1)
        assert found.fed is not None
        torch.testing.assert_close(found.fed, (w * power[:, None]).T @ w / len(w), rtol=1e-3, atol=1e-6)
        assert found.fed_power == pytest.approx(float(power @ g.square().sum(1)) / len(w), rel=1e-3)
    assert all(parameter.grad is None for parameter in session.base.model.parameters())


def test_gradients_reach_an_adapted_embedding(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    recipe = Recipe(transform="none", bytes=0.3, base_model=str(BASE), prompts=str(PROMPTS), metric="output")
    record = compress(tmp_path / "lora", tmp_path / "out", recipe, report_html=False)
    assert set(record["evidence"]["metric"]["kl"]) == {"plain", "output"}


@pytest.mark.parametrize("transform", ["none", pytest.param("ke", marks=pytest.mark.slow)])
def test_the_metric_that_does_better_is_kept_and_proved(tmp_path: Path, transform: str) -> None:
    recipe = Recipe(
        transform=transform, budget=0.25, base_model=str(BASE), prompts=str(PROMPTS),
        shared_size=32 if transform == "ke" else None,
    )  # fmt: skip
    record = compress(LORA, tmp_path / "out", recipe)
    evidence = record["evidence"]
    kl = evidence["metric"]["kl"]
    assert set(kl) == {"plain", "output", "input", "two-sided"}
    assert evidence["metric"]["kept"] == min(kl, key=lambda name: kl[name]) != "plain"
    assert evidence["rows"] == {"calibration": 38, "validation": 13, "test": 13}
    assert 0 < evidence["proof"]["retention"] < 1
    plain = compress(LORA, tmp_path / "plain", recipe.but(base_model=None, prompts=None))
    assert record["compact"]["parameter_ratio"] <= 0.25
    assert record["weight"]["relative_error"] >= plain["weight"]["relative_error"]
    assert "metric of 38 prompts" in (tmp_path / "out" / "report.html").read_text()
    assert json.loads((tmp_path / "out" / "fidelity.json").read_text()) == record
    again = compress(LORA, tmp_path / "again", recipe)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "again" / WEIGHTS).read_bytes()
    assert again["evidence"] == evidence


@pytest.mark.parametrize("size", [{"bytes": 0.125}, pytest.param({"budget": 0.25, "bits": 3}, marks=pytest.mark.slow)])
def test_codes_are_fitted_in_the_metric_and_take_no_more(tmp_path: Path, size: dict[str, Any]) -> None:
    recipe = Recipe(
        transform="ke", base_model=str(BASE), prompts=str(PROMPTS), metric="two-sided", shared_size=32, **size
    )
    record = compress(LORA, tmp_path / "out", recipe, report_html=False)
    plain = compress(
        LORA, tmp_path / "plain", recipe.but(base_model=None, prompts=None, metric="auto"), report_html=False
    )
    assert record["evidence"]["metric"]["kept"] == "two-sided"
    assert record["compact"]["bytes"] <= 1.01 * plain["compact"]["bytes"]
    assert record["weight"]["relative_error"] > plain["weight"]["relative_error"]
    codes = load_file(tmp_path / "out" / WEIGHTS)
    assert {name.rpartition("_")[2] for name in codes} <= {"widths", "scales", "floats", *map(str, WIDTHS)}
    if "bytes" in size:
        assert record["compact"]["bytes"] <= size["bytes"] * (LORA / WEIGHTS).stat().st_size


def test_a_metric_that_does_not_help_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bslora_convert.behaviour.evaluator import METRICS

    def useless(factors: Any, moments: Any) -> Metric:
        """Sees one direction of the inputs alone."""
        return Metric(right=lambda x: x * torch.eye(1, x.shape[1], dtype=x.dtype))

    monkeypatch.setitem(METRICS, "input", useless)  # type: ignore[arg-type]
    recipe = Recipe(transform="none", budget=0.25, base_model=str(BASE), prompts=str(PROMPTS), metric="input")
    record = compress(LORA, tmp_path / "out", recipe, report_html=False)
    assert record["evidence"]["metric"]["kept"] == "plain"
    assert any("the plain fit is kept" in note for note in record["notes"])


def test_rows_are_split_once_for_all_and_the_same_every_time() -> None:
    rows = read_prompts(PROMPTS)
    fit, choose, prove = split(rows, 3)
    assert split(rows, 3) == (fit, choose, prove) != split(rows, 4)
    lines = [row.line for part in (fit, choose, prove) for row in part]
    assert sorted(lines) == [row.line for row in rows]
    assert [len(part) for part in split(rows[:3], 0)] == [1, 1, 1]


def test_distillation_on_the_rows_of_the_evidence(tmp_path: Path) -> None:
    recipe = Recipe(
        transform="none", budget=0.2, base_model=str(BASE), prompts=str(PROMPTS), metric="input", finetune=True
    )
    record = compress(
        LORA, tmp_path / "out", recipe, training=Training(max_steps=4, evaluate_every=2), report_html=False
    )
    assert (record["training"]["training_rows"], record["training"]["heldout_rows"]) == (38, 13)
    assert record["evidence"]["proof"]["kl"] > 0
    with pytest.raises(InputError, match="can't be split into calibration"):
        short = tmp_path / "short.jsonl"
        short.write_text('{"prompt": "a", "completion": "b"}\n' * 2)
        compress(LORA, tmp_path / "none", recipe.but(prompts=str(short)), report_html=False)


# ---------------------------------------------------------------------------------------------- distillation


@pytest.mark.parametrize(("epochs", "rate", "times"), [(4, 6e-3, 2), pytest.param(20, 3e-3, 3, marks=pytest.mark.slow)])
def test_distillation_lowers_the_heldout_kl(
    session: BaseModelSession, examples: list[Example], tmp_path: Path, epochs: int, rate: float, times: int
) -> None:
    compress(LORA, tmp_path / "ke", Recipe(transform="ke", budget=0.6, shared_size=32), report_html=False)
    form = load_compact(tmp_path / "ke").form
    before = {name: tensor.clone() for name, tensor in named_tensors(form).items()}
    training = Training(train="local", epochs=epochs, learning_rate=rate, evaluate_every=epochs)
    part, held = split_heldout(examples, training)
    done = trained(session, form, part, held, training)
    assert done.record["heldout_kl_after"] * times <= done.record["heldout_kl_before"]
    # What the record says is what the stored form does.
    attached = Attached(session.base.model, done.form, {}, "distilled", enabled=False)
    total, tokens = kl_sums(session.base, session.known, attached, held, 8)
    assert total / tokens == pytest.approx(done.record["heldout_kl_after"], rel=1e-6)
    attached.remove()
    after = named_tensors(done.form)
    for name, tensor in before.items():
        assert not tensor.numel() or torch.equal(after[name], tensor) == ("bslora_local" not in name), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(form).items())
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}


@pytest.mark.parametrize("drawn", [False, True])
def test_distillation_stays_in_the_codes(drawn: bool, tmp_path: Path) -> None:
    """Those against A's random initialisation too."""
    lora = drawn_lora(LORA, tmp_path / "lora") if drawn else LORA
    recipe = Recipe(transform="ke", bytes=0.1, shared_size=32, finetune=str(PROMPTS), base_model=str(BASE))
    training = Training(epochs=4, learning_rate=3e-3, evaluate_every=5, max_length=96)
    compress(lora, tmp_path / "plain", recipe.but(finetune=None, base_model=None), report_html=False)
    record = compress(lora, tmp_path / "tuned", recipe, training=training, report_html=False)
    assert record["training"]["heldout_kl_after"] < 0.7 * record["training"]["heldout_kl_before"]
    before, after = load_compact(tmp_path / "plain"), load_compact(tmp_path / "tuned")
    assert before.layout == after.layout and bool(after.layout.initial) is drawn
    assert torch.equal(before.codes[WIDTHS_NAME], after.codes[WIDTHS_NAME])
    assert {name: t.shape for name, t in before.codes.items()} == {name: t.shape for name, t in after.codes.items()}
    first = named_tensors(before.form)
    same = {name: torch.equal(tensor, first[name]) for name, tensor in named_tensors(after.form).items()}
    assert all(equal for name, equal in same.items() if "local" not in name)
    assert not all(same.values())
    # `finetune` on the directory; where nothing is better, it comes out as it was.
    wild = Training(max_steps=2, learning_rate=3.0, clip=1e9, warmup=0.0, max_length=96)
    finetune(tmp_path / "tuned", tmp_path / "again", lora, str(BASE), PROMPTS, wild)
    again = load_compact(tmp_path / "again")
    assert all(torch.equal(again.codes[name], tensor) for name, tensor in after.codes.items())


@pytest.mark.parametrize(("train", "moved"), [("shared", False), ("all", True)])
def test_what_is_trained_is_what_was_asked_for(
    session: BaseModelSession, examples: list[Example], compact: Path, train: str, moved: bool
) -> None:
    form = load_compact(compact).form
    before = named_tensors(form)
    training = Training(train=train, max_steps=4, learning_rate=5e-3, evaluate_every=1)
    after = named_tensors(trained(session, form, examples[8:], examples[:8], training).form)
    for name, tensor in before.items():
        changed = not torch.equal(after[name], tensor)
        few = tensor.numel() <= 2  # two numbers may round to what they were
        assert few or changed == ("bslora_local" not in name or moved), name


def test_it_never_ends_worse_than_it_began(session: BaseModelSession, examples: list[Example], compact: Path) -> None:
    form = load_compact(compact).form
    wild = Training(max_steps=6, learning_rate=3.0, clip=1e9, evaluate_every=2, warmup=0.0)
    done = trained(session, form, examples[8:], examples[:8], wild)
    assert done.record["kept_step"] == 0
    assert done.record["heldout_kl_after"] == done.record["heldout_kl_before"]
    assert any("the starting one, which is kept" in note for note in done.notes)
    for name, tensor in named_tensors(form).items():
        assert torch.equal(named_tensors(done.form)[name], tensor)


def test_a_loss_that_is_not_finite_stops_with_the_best_state(
    session: BaseModelSession, examples: list[Example], compact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = Student.forward, []

    def breaks(student: Any, *args: Any) -> torch.Tensor:
        calls.append(1)
        return whole(student, *args) * (float("nan") if len(calls) == 5 else 1.0)

    monkeypatch.setattr(Student, "forward", breaks)
    training = Training(max_steps=20, learning_rate=5e-3, evaluate_every=2)
    done = trained(session, load_compact(compact).form, examples[8:], examples[:8], training)
    assert done.record["steps"] == 4
    assert done.record["kept_step"] == 4
    assert any("not finite at step 5" in note for note in done.notes)
    assert all(tensor.isfinite().all() for tensor in done.form.tensors())


def test_the_objective_and_accumulation(session: BaseModelSession, examples: list[Example], compact: Path) -> None:
    """A batch of eight is two of four accumulated; temperature and hidden term enter as the docstring says."""
    form = load_compact(compact).form
    losses = []
    for size, accumulate in ((8, 1), (4, 2)):
        training = Training(max_steps=2, batch_size=size, accumulate=accumulate, evaluate_every=2, temperature=2.0)
        done = trained(session, form, examples[8:], examples[:8], training)
        losses.append([row["loss"] for row in done.log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    base = Training(max_steps=1, evaluate_every=1)
    plain, hidden = (
        trained(session, form, examples[8:], examples[:8], replace(base, hidden_weight=weight)).log[0]["loss"]
        for weight in (0.0, 10.0)
    )
    assert hidden > plain


def test_the_learning_rate_rises_and_falls() -> None:
    training = Training(learning_rate=1.0, warmup=0.1)
    rates = [training.rate_at(share / 100) for share in range(1, 120)]
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == 9  # a tenth
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.01)
    assert Training(warmup=0.0).rate_at(0.001) == pytest.approx(Training().learning_rate, rel=1e-4)


def test_the_same_seed_gives_the_same_bytes(compact: Path, tmp_path: Path) -> None:
    training = Training(max_steps=4, epochs=2, learning_rate=5e-3, evaluate_every=2, seed=3)
    for name in ("first", "second"):
        finetune(compact, tmp_path / name, LORA, str(BASE), PROMPTS, replace(training, limit=24))
    assert (tmp_path / "first" / WEIGHTS).read_bytes() == (tmp_path / "second" / WEIGHTS).read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "first" / "training.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    record = json.loads((tmp_path / "first" / "fidelity.json").read_text())
    assert set(record["training"]) >= {
        "steps", "kept_step", "heldout_kl_before", "heldout_kl_after", "tokens_per_second", "peak_bytes", "trained"
    }  # fmt: skip
    assert "Distillation" in (tmp_path / "first" / "report.html").read_text()
    assert not list(tmp_path.glob(".*training*"))
    assert (
        record["compact"]["parameters"] == json.loads((compact / "fidelity.json").read_text())["compact"]["parameters"]
    )


def step_of(state: Path) -> int:
    try:
        return int(json.loads(state.read_text())["step"])
    except FileNotFoundError:  # before the first, or just while another takes its place
        return 0


def test_resuming_after_a_kill_ends_as_an_uninterrupted_run(compact: Path, tmp_path: Path) -> None:
    often = by_file(tmp_path / "often.toml", evaluate_every=2)

    few = tmp_path / "few.jsonl"
    few.write_text("".join(PROMPTS.read_text().splitlines(keepends=True)[:30]))

    def command(name: str, *more: str) -> list[str]:
        return [
            sys.executable, "-m", "bslora_convert", "finetune", str(compact), str(tmp_path / name), "--reference", str(LORA),
            "--base-model", str(BASE), "--prompts", str(few), "--max-steps", "12", "--epochs", "9", *often,
            "--learning-rate", "0.005", "--train", "all", "-q", *more,
        ]  # fmt: skip

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FIXTURES.parent)}
    assert CliRunner().invoke(main, command("whole")[3:]).exit_code == 0
    state = tmp_path / ".killed.training" / "state" / "state.json"
    reached = 0
    for sign, *more in ((signal.SIGKILL,), (signal.SIGTERM, "--resume")):
        process = subprocess.Popen(command("killed", *more), env=environment, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while step_of(state) <= reached and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        assert process.poll() is None, "the run ended before it could be stopped"
        process.send_signal(sign)
        _, stderr = process.communicate()
        assert ("--resume goes on" in stderr, process.returncode) == (sign == signal.SIGTERM, 130 if more else -sign)
        assert not (tmp_path / "killed").exists()
        assert reached < step_of(state) < 12
        reached = step_of(state)
    warmer = by_file(tmp_path / "warmer.toml", evaluate_every=2, temperature=2.0)
    other = CliRunner().invoke(main, [*command("killed", "--resume")[3:], *warmer])
    assert other.exit_code == 2
    assert "trained with temperature 1.0, now 2.0" in other.stderr
    assert CliRunner().invoke(main, command("killed", "--resume")[3:]).exit_code == 0
    whole, resumed = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "killed"))
    assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())
    logs = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "training.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    assert logs[0] == logs[1]
    assert not (tmp_path / ".killed.training").exists()


@pytest.mark.slow
def test_two_processes_train_as_one(compact: Path, tmp_path: Path) -> None:
    """The rows of a batch are shared out; losses and the end agree up to the order of sums, and one process speaks."""
    arguments = [
        "finetune", str(compact), "OUT", "--reference", str(LORA), "--base-model", str(BASE), "--prompts", str(PROMPTS),
        "--max-steps", "4", "--learning-rate", "0.005", "--json", "--device", "cpu",
        *by_file(tmp_path / "recipe.toml", evaluate_every=2, batch_size=5),
    ]  # fmt: skip
    launch = {
        "one": ["-m", "bslora_convert"],
        "two": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bslora_convert"],
    }
    found = {}
    for name, how in launch.items():
        command = [sys.executable, *how, *(str(tmp_path / name) if word == "OUT" else word for word in arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FIXTURES.parent)}
        done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
        record = json.loads(done.stdout)
        rows = [json.loads(line) for line in (tmp_path / name / "training.jsonl").read_text().splitlines()]
        found[name] = record, [row["loss"] for row in rows], load_file(tmp_path / name / WEIGHTS)
    (one, losses, tensors), (two, other_losses, others) = found["one"], found["two"]
    assert (one["training"]["processes"], two["training"]["processes"]) == (1, 2)
    assert other_losses == pytest.approx(losses, rel=1e-4)
    assert two["training"]["heldout_kl_after"] == pytest.approx(one["training"]["heldout_kl_after"], rel=1e-2)
    assert not list(tmp_path.glob(".*"))
    for key, tensor in tensors.items():
        torch.testing.assert_close(others[key].float(), tensor.float(), rtol=0.02, atol=1e-3)


def test_the_reference_writes_missing_completions_once(
    session: BaseModelSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": json.loads(line)["prompt"]} for line in PROMPTS.read_text().splitlines()[:3]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = Writing(tmp_path / "kept")
    rows = session.encode(Prompts.read(path, max_new_tokens=5), kept)
    first = rows.examples
    assert any("3 rows of prompts.jsonl had no completion" in note for note in rows.notes)
    (cache,) = (tmp_path / "kept").iterdir()
    known = json.loads(cache.read_text())
    assert set(known["completions"]) == {"1", "2", "3"}
    known["completions"]["2"] = " from the cache"
    cache.write_text(json.dumps(known))
    second = session.encode(Prompts.read(path, max_new_tokens=5), kept).examples
    assert (second[0].ids, second[2].ids) == (first[0].ids, first[2].ids)
    assert "from the cache" in session.base.tokenizer.decode(second[1].ids)
    third = session.encode(Prompts.read(path, max_new_tokens=6), kept).examples  # another question, another answer
    assert "from the cache" not in session.base.tokenizer.decode(third[1].ids)


def test_time_and_patience_end_it(session: BaseModelSession, examples: list[Example], compact: Path) -> None:
    form = load_compact(compact).form
    rows = (examples[8:], examples[:8])
    short = trained(session, form, *rows, Training(max_minutes=1e-9, epochs=50))
    assert short.record["steps"] == 0
    began = time.perf_counter() - 3600  # the hour that the rest of the command took counts
    late = trained(session, form, *rows, Training(max_minutes=59, epochs=50), began=began)
    assert late.record["steps"] == 0
    stuck = Training(learning_rate=1e-12, evaluate_every=1, patience=2, epochs=50)
    assert trained(session, form, *rows, stuck).record["steps"] <= 4


def test_recomputing_activations_changes_nothing(
    examples: list[Example], compact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bslora_convert.behaviour import memory

    form = load_compact(compact).form
    training = Training(max_steps=2, evaluate_every=2, learning_rate=5e-3)
    found = []
    for free in (1 << 40, 0):
        monkeypatch.setattr(memory, "free_bytes", lambda _, free=free: free)
        fresh = BaseModelSession(read_adapter(LORA), str(BASE))
        found.append(trained(fresh, form, examples[8:], examples[:8], training))
    assert not any("recomputed" in note for note in found[0].notes)
    assert any("recomputed" in note for note in found[1].notes)
    assert [row["loss"] for row in found[0].log] == pytest.approx([row["loss"] for row in found[1].log], rel=1e-5)


def test_wrong_use_is_refused(compact: Path, tmp_path: Path, examples: list[Example]) -> None:
    for fields, words in (
        ({"train": "some"}, "train is 'some'"), ({"max_steps": 0}, "max_steps is 0"), ({"epochs": -1.0}, "epochs is -1"),
        ({"learning_rate": float("nan")}, "learning_rate"), ({"batch_size": 0}, "batch_size is 0"),
        ({"heldout": 1.0}, "heldout is 1"),
        ({"hidden_weight": -1.0}, "hidden_weight"), ({"temperature": 0.0}, "temperature is 0"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=words):
            Training(**fields)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="prompts needs the base model"):
        Recipe(prompts="rows.jsonl")
    with pytest.raises(InputError, match="can't be split"):
        split_heldout(examples[:1], Training())
    with pytest.raises(InputError, match=r"don't change the same modules|was made for"):
        other = tmp_path / "none"
        compress(TINY / "gsm8k", other, Recipe(transform="none", budget=0.3))
        config = json.loads((other / "adapter_config.json").read_text())
        name = "model.layers.0.self_attn.q_proj"
        (entry,) = (said for pattern, said in config["modules"].items() if pattern.endswith("self_attn.q_proj"))
        config["modules"] = {name: {**entry, "rank": int(str(entry["rank"]).split()[0])}}
        (other / "adapter_config.json").write_text(json.dumps(config))
        from safetensors.torch import save_file

        kept = {k: v for k, v in load_file(other / WEIGHTS).items() if f".{name}." in k}
        save_file(kept, other / WEIGHTS)
        finetune(other, tmp_path / "out", LORA, str(BASE), PROMPTS, accept_changed=True)
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(main, ["finetune", str(compact), str(compact), "--reference", str(LORA), "--base-model", str(BASE),
                                     "--prompts", str(PROMPTS)])  # fmt: skip
    assert done.exit_code == 2
    assert "would replace the source" in done.stderr
    lora = Path(shutil.copytree(LORA, tmp_path / "lora"))
    for out in (lora, compact):
        with pytest.raises(InputError, match="would replace the source"):
            finetune(compact, out, lora, str(BASE), PROMPTS, overwrite=True)


def test_shared_needs_something_shared(session: BaseModelSession, examples: list[Example], tmp_path: Path) -> None:
    compress(LORA, tmp_path / "none", Recipe(transform="none", budget=0.3), report_html=False)
    form = load_compact(tmp_path / "none").form
    with pytest.raises(RecipeError, match="has no such part"):
        trained(session, form, examples[8:], examples[:8], Training(train="shared"))
