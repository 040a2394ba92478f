"""Sharing learned in training, sharing found after it, and codes: every form trained on the same rows, beside a converted LoRA.

    python benchmarks/trained.py BASE [train] [convert] [ablate] [speed] [show] [--rows fixtures/short-answers] [--steps 50]
        [--seeds 1] [--only "LoRA r=8;VeRA r=64"] [--device cpu] [--out build/trained]

BASE: a causal model such as SmolLM2-135M; q, k, v, up and down of every layer are adapted, as in the paper.

train    AdamW, a warm-up of a tenth and half a cosine, batches of 8 rows, loss on completions, float32. The learning rate climbs
         a ladder of factors of two from where the form's kind usually is, until the loss on the rows that choose gets worse:
         three rates or more. The best one's run counts, on rows that neither saw. Seeds above the first take that rate.
convert  The LoRA of rank 16 that was trained, converted to the numbers of each BSLoRA (the same form, and local parts alone) and
         to its bytes in codes.
ablate   Windows, draws, sizes, kernels and ranks, at the rate of the form that they vary.
speed    Steps a second of each form by itself: of CPU time on one thread, on a GPU by the clock.
show     The table of what is there (also after all others).

Loss: nats a token of completions. Accuracy: rows whose greedy answer is right to the last token and then ends. Bytes: two a
number for what was trained, the file for what was converted.

Every run is a line of OUT/<steps>-steps/runs.jsonl as it ends; what is there is not run again, and processes of different forms
may write beside each other. A run of 50 steps takes three minutes of CPU time, all forms and ablations are eighty runs;
the first line of the output says it for what was asked. On a GPU a run took a sixth of that, nine beside each other.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, VBLoRAConfig, VeraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from transformers import AutoModelForCausalLM, AutoTokenizer

from bslora_convert import Recipe, compress, load_compact, load_into
from bslora_convert.modules.names import kind_of, layer_of
from bslora_convert.peft import BsloraConfig, Init
from bslora_convert.peft.fresh import DEFAULT_TARGETS, targets

ROOT = Path(__file__).parents[1]
PARTS = ["train", "convert", "ablate", "speed", "show"]
BATCH = 8
SECONDS = 3.6  # of CPU time a step takes on one thread, measuring counted
LADDER = [2.0**k * 5e-4 for k in range(-4, 9)]  # 3e-5 to 0.13
LORA, SMALL = 6, 8  # where on it LoRA's kinds usually are, and those of few numbers
REFERENCE = "LoRA r=16"  # what is converted


class Gated(nn.Module):
    """Tied-LoRA's TL6: v ⊙ (B (u ⊙ x)), u and v the module's own, B shared."""

    def __init__(self, shared: nn.Linear) -> None:
        super().__init__()
        self.weight = shared.weight
        self.u, self.v = nn.Parameter(torch.ones(shared.in_features)), nn.Parameter(torch.ones(shared.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """What PEFT takes B to do."""
        return linear(x * self.u, self.weight) * self.v


def lora(rank: int) -> Callable[[Any], PeftModel]:
    """PEFT's, alpha twice the rank."""
    return lambda model: get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(DEFAULT_TARGETS))
    )


def tied(rank: int, sides: str, group: Callable[[str], object], gated: bool = False) -> Callable[[Any], PeftModel]:
    """PEFT's LoRA with one A, one B or both in all modules of a group; a group of None is a module's own."""

    def make(model: Any) -> PeftModel:
        tuned, first = lora(rank)(model), dict[tuple[str, object], nn.Parameter]()
        for name, layer in tuned.named_modules():
            if not hasattr(layer, "lora_A") or (key := group(name.removeprefix("base_model.model."))) is None:
                continue
            for side in sides:
                held = getattr(layer, f"lora_{side}")
                held["default"].weight = first.setdefault((side, key), held["default"].weight)
            if gated:
                layer.lora_B["default"] = Gated(layer.lora_B["default"])
        return tuned

    return make


def qkv(name: str) -> str | None:
    """ShareLoRA's third form: one A for a layer's q, k and v."""
    return layer_of(name) if name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj") else None


def bslora(transform: str, ranks: tuple[int, int, int], **options: Any) -> Callable[[Any], PeftModel]:
    """Ours."""
    init = Init(options.pop("init", "kaiming_normal"), options.pop("a", "normal"))
    return lambda model: get_peft_model(model, BsloraConfig.new(model, transform, ranks, init=init, **options))


def vera(model: Any) -> PeftModel:
    """PEFT's."""
    return get_peft_model(model, VeraConfig(r=64, target_modules=list(DEFAULT_TARGETS), save_projection=False))


def vb_lora(model: Any) -> PeftModel:
    """PEFT's, sub-vectors as long as divides every side."""
    length = math.gcd(*(side for entry in targets(model, list(DEFAULT_TARGETS), {}).values() for side in entry.shape))
    config = VBLoRAConfig(r=4, num_vectors=90, vector_length=length, topk=2, target_modules=list(DEFAULT_TARGETS))
    return get_peft_model(model, config)


@dataclass(frozen=True)
class Form:
    """make: puts a new adapter on a model. start: on the ladder. converted: the transform of its counterpart after training."""

    make: Callable[[Any], PeftModel]
    start: int = LORA
    converted: str | None = None


KE, SS, GT = (2, 4, 16), (2, 4, 16), (2, 8, 16)  # the paper's; of SS the one that its Llama-3-8B has
FORMS = {
    "LoRA r=16": Form(lora(16)),
    "BSLoRA ke (2,4,16)": Form(bslora("ke", KE), converted="ke"),
    "BSLoRA ss (2,4,16)": Form(bslora("ss", SS), converted="ss"),
    "BSLoRA gt (2,8,16)": Form(bslora("gt", GT, shared_size=192), converted="gt"),
    "LoRA r=8": Form(lora(8)),
    "LoRA r=4": Form(lora(4)),
    "LoRA r=2": Form(lora(2)),
    "ss intra only (0,8,0)": Form(bslora("ss", (0, 8, 0)), converted="ss"),
    "ss inter only (0,0,32)": Form(bslora("ss", (0, 0, 32)), SMALL),
    "ke intra only (0,8,0)": Form(bslora("ke", (0, 8, 0)), SMALL, converted="ke"),
    "ke inter only (0,0,32)": Form(bslora("ke", (0, 0, 32)), SMALL),
    "gt intra only (0,8,0)": Form(bslora("gt", (0, 8, 0), shared_size=192)),
    "ShareLoRA A r=8": Form(tied(8, "A", kind_of)),
    "ShareLoRA B r=8": Form(tied(8, "B", kind_of)),
    "ShareLoRA qkv r=8": Form(tied(8, "A", qkv)),
    "ShareLoRA AB = TL5 r=8": Form(tied(8, "AB", kind_of), SMALL),
    "Tied-LoRA TL6 r=8": Form(tied(8, "AB", kind_of, gated=True), SMALL),
    "VeRA r=64": Form(vera, SMALL + 2),
    "VB-LoRA r=4": Form(vb_lora, SMALL),
}
ABLATIONS = {
    "ss window top-left": ("BSLoRA ss (2,4,16)", bslora("ss", SS, slice="top-left")),
    "ss window bottom-right": ("BSLoRA ss (2,4,16)", bslora("ss", SS, slice="bottom-right")),
    "ke kernels kaiming uniform": ("BSLoRA ke (2,4,16)", bslora("ke", KE, init="kaiming_uniform")),
    "ke kernels ones": ("BSLoRA ke (2,4,16)", bslora("ke", KE, init="ones")),
    "ke A uniform": ("BSLoRA ke (2,4,16)", bslora("ke", KE, a="kaiming_uniform")),
    "ke size 64": ("BSLoRA ke (2,4,16)", bslora("ke", KE, shared_size=64)),
    "ke size 96": ("BSLoRA ke (2,4,16)", bslora("ke", KE, shared_size=96)),
    "gt size 64": ("BSLoRA gt (2,8,16)", bslora("gt", GT, shared_size=64)),
    "ke kernel 1_r": ("BSLoRA ke (2,4,16)", bslora("ke", KE, kernel="1_r")),
    "ke kernel 2_r": ("BSLoRA ke (2,4,16)", bslora("ke", KE, kernel="2_r")),
    "ke ranks (1,4,16)": ("BSLoRA ke (2,4,16)", bslora("ke", (1, 4, 16))),
    "ke ranks (2,8,16)": ("BSLoRA ke (2,4,16)", bslora("ke", (2, 8, 16))),
    "ke ranks (2,4,32)": ("BSLoRA ke (2,4,16)", bslora("ke", (2, 4, 32))),
}


@dataclass(frozen=True)
class Row:
    """Token ids of a prompt and its completion, which ends with the end of the text."""

    task: str
    prompt: list[int]
    completion: list[int]


class Bench:
    """One base model, its rows, and the runs that were made."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out / f"{options.steps}-steps"
        self.out.mkdir(parents=True, exist_ok=True)
        self.file = self.out / "runs.jsonl"
        self.runs = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        tokenizer = AutoTokenizer.from_pretrained(options.base)
        self.end = int(tokenizer.eos_token_id)
        self.rows = {
            name: self._read(tokenizer, options.rows / f"{name}.jsonl") for name in ("train", "choose", "heldout")
        }

    def _read(self, tokenizer: Any, path: Path) -> list[Row]:
        read = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        encode = lambda text: list(tokenizer(text, add_special_tokens=False).input_ids)  # noqa: E731
        return [Row(r["task"], encode(r["prompt"]), [*encode(r["completion"]), self.end]) for r in read]

    def base(self) -> Any:
        """The base model; nothing that was done to another one is in it."""
        return AutoModelForCausalLM.from_pretrained(self.options.base, dtype=torch.float32).to(self.options.device)

    def kept(self, **wanted: Any) -> list[dict[str, Any]]:
        """Runs of these fields."""
        return [run for run in self.runs if all(run.get(key) == value for key, value in wanted.items())]

    def keep(self, run: dict[str, Any]) -> dict[str, Any]:
        """Writes a run down."""
        self.runs.append(run)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        shown = {key: round(value, 6) if isinstance(value, float) else value for key, value in run.items()}
        print(time.strftime("%H:%M:%S"), shown, flush=True)
        return run

    def logits(self, model: Any, rows: list[Row]) -> tuple[Tensor, Tensor]:
        """Of the completions' tokens only, and these: (n, vocabulary), (n,). Prompts are filled up on their left."""
        length, last = max(len(r.prompt + r.completion) for r in rows), max(len(r.completion) for r in rows)
        ids, mask = torch.full((len(rows), length), self.end), torch.zeros(len(rows), length, dtype=torch.long)
        wanted = torch.full((len(rows), last), -100)
        for row, at in zip(rows, range(len(rows)), strict=True):
            whole = row.prompt + row.completion
            ids[at, -len(whole) :], mask[at, -len(whole) :] = torch.tensor(whole), 1
            wanted[at, -len(row.completion) :] = torch.tensor(row.completion)
        ids, mask, wanted = (tensor.to(self.options.device) for tensor in (ids, mask, wanted))
        found = model(input_ids=ids, attention_mask=mask, logits_to_keep=last + 1).logits[:, :-1]
        return found[wanted >= 0], wanted[wanted >= 0]

    @torch.no_grad()
    def measure(self, model: Any, name: str) -> dict[str, Any]:
        """Loss a token, and for each task the share of rows that are right."""
        model.eval()
        nats, tokens, right = 0.0, 0, dict[str, list[bool]]()
        rows = sorted(self.rows[name], key=lambda row: len(row.prompt))
        for start in range(0, len(rows), 20):
            batch = rows[start : start + 20]
            logits, wanted = self.logits(model, batch)
            nats += float(cross_entropy(logits.float(), wanted, reduction="sum"))
            tokens += len(wanted)
            good = (logits.argmax(-1) == wanted).split([len(row.completion) for row in batch])
            for row, each in zip(batch, good, strict=True):
                right.setdefault(row.task, []).append(bool(each.all()))
        return {"loss": nats / tokens, **{task: sum(found) / len(found) for task, found in sorted(right.items())}}

    def train(self, name: str, form: Form, rate: float, seed: int, stage: str = "train") -> dict[str, Any]:
        """One run."""
        done = self.kept(stage=stage, name=name, rate=rate, seed=seed)
        if done:
            return done[0]
        model, trained = self.steps(form, rate, seed, self.options.steps)
        found = {"choose": self.measure(model, "choose")["loss"]}
        best = self.best(name) if seed == 0 and stage == "train" else None
        if best is None or found["choose"] < best["choose"]:  # what another rate does better is not shown
            found |= self.measure(model, "heldout")
        if name == REFERENCE and seed == 0:
            model.save_pretrained(self.out / "lora" / f"{rate:g}")
        numbers = sum(parameter.numel() for parameter in trained)
        return self.keep({"stage": stage, "name": name, "rate": rate, "seed": seed, "parameters": numbers,
                          "bytes": 2 * numbers, **found})  # fmt: skip

    def steps(self, form: Form, rate: float, seed: int, steps: int) -> tuple[Any, list[nn.Parameter]]:
        """A model after so many of them, and what was trained on it."""
        torch.manual_seed(seed)
        model = form.make(self.base()).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        for step, rows in zip(range(steps), self.batches(seed), strict=False):
            share = (step + 1) / steps
            factor = min(share / 0.1, 0.5 * (1 + math.cos(math.pi * max(share - 0.1, 0) / 0.9)))
            for group in optimizer.param_groups:
                group["lr"] = rate * max(factor, 0.01)
            logits, wanted = self.logits(model, rows)
            cross_entropy(logits, wanted).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return model, trained

    def speed(self, name: str, form: Form) -> None:
        """Steps a second: what twenty more take."""
        if self.kept(stage="speed", name=name, device=self.options.device):
            return
        on_gpu, spent = torch.device(self.options.device).type == "cuda", []
        for steps in (5, 25):
            began = time.perf_counter() if on_gpu else time.process_time()
            self.steps(form, LADDER[0], 0, steps)
            if on_gpu:
                torch.cuda.synchronize()
            spent.append((time.perf_counter() if on_gpu else time.process_time()) - began)
        self.keep(
            {
                "stage": "speed",
                "name": name,
                "device": self.options.device,
                "steps_a_second": 20 / (spent[1] - spent[0]),
            }
        )

    def batches(self, seed: int) -> Iterator[list[Row]]:
        """Batches of rows of like length, one epoch after another, in an order that the seed decides alone."""
        draw = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.rows["train"]), generator=draw).tolist()
            rows = sorted((self.rows["train"][at] for at in order), key=lambda row: len(row.prompt + row.completion))
            starts = torch.randperm(len(rows) // BATCH, generator=draw).tolist()
            yield from (rows[BATCH * at : BATCH * (at + 1)] for at in starts)

    def search(self, name: str, form: Form) -> dict[str, Any]:
        """The run at the best rate: up or down the ladder for as long as it gets better."""
        runs = {at: self.train(name, form, LADDER[at], 0) for at in (form.start, form.start + 1)}
        direction = 1 if runs[form.start + 1]["choose"] < runs[form.start]["choose"] else -1
        at = form.start + (2 if direction > 0 else -1)
        while 0 <= at < len(LADDER):
            runs[at] = self.train(name, form, LADDER[at], 0)
            if not runs[at]["choose"] < runs[at - direction]["choose"]:
                break
            at += direction
        return min(runs.values(), key=lambda run: run["choose"])

    def best(self, name: str) -> dict[str, Any] | None:
        """The best run of the first seed so far."""
        return min(self.kept(stage="train", name=name, seed=0), key=lambda run: run["choose"], default=None)

    def convert(self) -> None:
        """The trained LoRA at the numbers and at the bytes of each BSLoRA."""
        reference = self.search(REFERENCE, FORMS[REFERENCE])
        lora = self.out / "lora" / f"{reference['rate']:g}"
        size = (lora / "adapter_model.safetensors").stat().st_size
        for name, form in FORMS.items():
            run = self.best(name)
            if form.converted is None or run is None or (self.options.only and name not in self.options.only):
                continue
            share = run["parameters"] / reference["parameters"]
            recipes = {
                f"to {form.converted} of its numbers": Recipe(transform=form.converted, budget=share, dtype="bfloat16"),
                "to local parts of its numbers": Recipe(transform="none", budget=share, dtype="bfloat16"),
                "to codes of its bytes": Recipe(transform="none", bytes=run["bytes"] / size),
            }
            for how, recipe in recipes.items():
                if self.kept(stage="convert", of=name, name=how):
                    continue
                place = self.out / "converted" / str(list(FORMS).index(name))  # processes may stand beside each other
                compress(lora, place, recipe, overwrite=True, report_html=False)
                adapter, model = load_compact(place), self.base()
                with load_into(model, place):
                    found = self.measure(model, "heldout")
                self.keep({"stage": "convert", "of": name, "name": how, "parameters": adapter.parameters,
                           "bytes": (place / "adapter_model.safetensors").stat().st_size, **found})  # fmt: skip

    def bare(self) -> None:
        """The base model without anything."""
        if not self.kept(stage="base"):
            self.keep(
                {"stage": "base", "name": "base", "parameters": 0, "bytes": 0, **self.measure(self.base(), "heldout")}
            )

    def show(self) -> None:
        """Everything that is there, as one table."""
        tasks = sorted({row.task for row in self.rows["heldout"]})
        table = Table(title=f"{len(self.rows['heldout'])} rows held out, {self.options.steps} steps of {BATCH} rows")
        for column in ("", "numbers", "MB", "rate", "loss", *tasks, "steps/s", "seeds"):
            table.add_column(column, justify="right" if column else "left")

        def line(label: str, runs: list[dict[str, Any]]) -> None:
            def mean(key: str) -> float:
                return sum(run[key] for run in runs) / len(runs)

            def spread(key: str, digits: int) -> str:
                wide = (sum((run[key] - mean(key)) ** 2 for run in runs) / max(len(runs) - 1, 1)) ** 0.5
                return f"{mean(key):.{digits}f}" + (f" ±{wide:.{digits}f}" if len(runs) > 1 else "")

            timed = self.kept(stage="speed", name=label)
            speed = f"{timed[-1]['steps_a_second']:.2f}" if timed else ""
            rate = f"{runs[0]['rate']:.2g}" if "rate" in runs[0] else ""
            table.add_row(label, f"{runs[0]['parameters']:,}", f"{runs[0]['bytes'] / 1e6:.2f}", rate, spread("loss", 4),
                          *(spread(task, 3) for task in tasks), speed, str(len(runs)))  # fmt: skip

        for run in self.kept(stage="base")[:1]:
            line("base", [run])
        for name in FORMS:
            best = self.best(name)
            if best is not None:
                line(name, self.kept(stage="train", name=name, rate=best["rate"]))
            for run in self.kept(stage="convert", of=name):
                line(f"  {REFERENCE} {run['name']}", [run])
        for name in ABLATIONS:
            if runs := self.kept(stage="ablate", name=name):
                line(name, runs)
        Console(width=150).print(table)


def main() -> None:
    """Runs what is asked for and is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("parts", nargs="*", default=[])
    parser.add_argument("--rows", type=Path, default=ROOT / "fixtures" / "short-answers")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", type=lambda text: text.split(";"), help="names of forms and ablations, divided by ;")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("build/trained"))
    options = parser.parse_intermixed_args()
    parts = options.parts or PARTS
    unknown = set(parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    bench = Bench(options)
    forms = {name: form for name, form in FORMS.items() if not options.only or name in options.only}
    if parts != ["show"]:
        minutes = options.steps * SECONDS / 60
        print(f"{len(bench.runs)} runs are there. About {minutes:.1f} minutes a run on a CPU, 3.3 runs a form: "
              f"{len(forms) * 3.3 * minutes / 60:.1f} hours for {len(forms)} forms")  # fmt: skip
        bench.bare()
    if "train" in parts:
        for name, form in forms.items():
            bench.search(name, form)
            if "convert" in parts and name in list(FORMS)[1:4]:
                bench.convert()
    if "convert" in parts:
        bench.convert()
    for seed in range(1, options.seeds if "train" in parts else 1):
        for name, form in forms.items():
            bench.train(name, form, bench.search(name, form)["rate"], seed)
    if "ablate" in parts:
        for name, (parent, make) in ABLATIONS.items():
            if not options.only or name in options.only:
                best = bench.search(parent, FORMS[parent])
                for seed in range(options.seeds):
                    bench.train(name, Form(make), best["rate"], seed, stage="ablate")
    if "speed" in parts:
        for name, form in forms.items():
            bench.speed(name, form)
    bench.show()


if __name__ == "__main__":
    main()
