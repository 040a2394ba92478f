"""Distillation: a compact adapter is trained to predict what the original predicts, on one base model in memory.

    loss = T² · mean over completion tokens of KL(softmax(l_original / T) ‖ softmax(l_compact / T))  [ + w · hidden term ]

    hidden term   ‖h_compact − h_original‖² / ‖h_original‖² on the last hidden states

The compact adapter's own tensors are the parameters, in float32; both adapters hang on the base through hooks and take turns.
The state with the lowest KL on held-out rows is kept, the starting state included, so that it never ends worse than it began:
states are measured as they would be stored, rounded to the storage dtype.

An adapter in codes stays in them: each step's loss and gradient are taken at what its numbers would be once coded, with the
widths that it began with and scales fitted anew, and move the numbers themselves (the straight-through estimator). The result
takes as many bytes as it began with.

With several processes (`accelerate launch`) each takes its share of every batch's rows and of the held-out ones; gradients and
sums are added up, so that the run is the same as with one process, up to the order of the sums (the hidden term is a ratio of
each share's own sums). The first one writes.
"""

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bslora_convert.behaviour.divergence import kl_sums
from bslora_convert.behaviour.memory import enable_checkpointing, peak_bytes
from bslora_convert.behaviour.prompts import Batch, Example, batches
from bslora_convert.behaviour.quantiser import Quantiser
from bslora_convert.behaviour.session import BaseModelSession
from bslora_convert.behaviour.student import Student
from bslora_convert.behaviour.training_rows import TrainingRows, TrainingRun
from bslora_convert.behaviour.training_state import STATE_NAME, RunState, load_state, not_of_this_run, save_state
from bslora_convert.bslora.codes.file import coded_tensors
from bslora_convert.bslora.form import BsloraForm
from bslora_convert.bslora.layout import Layout
from bslora_convert.bslora.tensors import assemble, named_tensors
from bslora_convert.conversion.request import Converted
from bslora_convert.process.progress import Progress
from bslora_convert.results.adapter import TrainingRecord

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


@dataclass(frozen=True, slots=True)
class Distilled:
    """What distillation gives: the form to store, the row of every step, what it says of itself, and the form's codes, if any."""

    form: BsloraForm
    log: tuple[Mapping[str, Any], ...]
    record: TrainingRecord
    notes: tuple[str, ...] = ()
    codes: Mapping[str, Tensor] = field(default_factory=dict)


def distill(
    session: BaseModelSession,
    start: Converted,
    rows: TrainingRows,
    run: TrainingRun,
    *,
    checkpoints: Path | None = None,
    resume: bool = False,
) -> Distilled:
    """Trains a form against the session's reference; see the module's docstring.

    start: the form, with the codes that it was decoded from, if any; the result stays in such codes.
    checkpoints: a directory that takes the state after every evaluation; resume: go on from there where there is one.

    :raises InputError: when checkpoints are of another run or damaged.
    """
    trainer = Trainer(session, start, rows, run, checkpoints)
    try:
        if resume and checkpoints is not None and (checkpoints / STATE_NAME).is_file():
            trainer.go_on(checkpoints)
        elif checkpoints is not None and trainer.accelerator.is_main_process:
            shutil.rmtree(checkpoints, ignore_errors=True)
        return trainer.finish(session.progress)
    finally:
        trainer.student.attached.remove()


class Trainer:
    """One training run: parameters, optimiser, the best state so far."""

    def __init__(
        self,
        session: BaseModelSession,
        start: Converted,
        rows: TrainingRows,
        run: TrainingRun,
        checkpoints: Path | None,
    ) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        training = self.training = run.training
        self.base, self.reference, self.known = session.base, session.reference, session.known
        self.rows, self.checkpoints, self.began = rows, checkpoints, run.began
        self.layout = Layout.of(start.form)
        stored = Layout.of(start.form, start.initial).stored()
        coded = coded_tensors(start.codes, stored) if start.codes else {}
        self.quantiser = Quantiser(next(start.form.tensors()).dtype, coded, start.initial)
        self.codes: Mapping[str, Tensor] = start.codes
        tensors = {
            name: tensor.detach().to(self.base.device, torch.float32, copy=True)
            for name, tensor in named_tensors(start.form).items()
        }
        self.student = Student(self.base, tensors, self.layout, training.train, self.reference.carried)
        # Experts that no token has reached have no gradient.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = Accelerator(cpu=self.base.device.type == "cpu", kwargs_handlers=[unused])
        self.share = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        optimizer = torch.optim.AdamW(self.student.parameters(), lr=training.learning_rate, weight_decay=0.0)
        self.model, self.optimizer = self.accelerator.prepare(self.student, optimizer)
        self.best = {name: tensor.clone() for name, tensor in tensors.items()}
        self.state, self.evaluation_seconds = RunState(), 0.0
        self.notes: list[str] = []
        self.steps = training.steps_over(len(rows.train))
        longest = max(len(example.ids) for example in rows.train)
        if enable_checkpointing(self.base.model, min(len(rows.train), training.batch_size), longest, self.base.device):
            self.notes.append("activations are recomputed in the backward pass: they would not fit in the free memory")

    def finish(self, progress: Progress) -> Distilled:
        """Trains to the end and returns the best state."""
        if math.isnan(self.state.before):
            progress("measuring the start")
            self.state.before = self.state.lowest = self._heldout()
        order = self._order()
        for _ in range(self.state.step * self.training.accumulate):
            next(order)
        while self.state.step < self.steps and self._spent() < 1 and self.state.stale < self.training.patience:
            row = self.one_step(order)
            if row is None:
                self.notes.append(
                    f"the loss was not finite at step {self.state.step + 1}; the best state before it is kept"
                )
                break
            self.state.step += 1
            if self.state.step % self.training.evaluate_every == 0 or self.state.step == self.steps:
                row["heldout_kl"] = self._evaluate()
            self.state.log.append(row)
            if "heldout_kl" in row and self.checkpoints is not None and self.accelerator.is_main_process:
                save_state(self.checkpoints, self.training, self.state, self._tensors())
            progress("training", self.state.step, self.steps, self._said(row))
        if self.state.step and self.state.log and "heldout_kl" not in self.state.log[-1]:
            self.state.log[-1]["heldout_kl"] = self._evaluate()
        return self._result()

    def _said(self, row: Mapping[str, Any]) -> str:
        return f"loss {row['loss']:.4f}, held-out KL {self.state.lowest:.5f}, {row['tokens_per_second']:.0f} tokens/s"

    def _spent(self) -> float:
        """Share of the minutes that is gone, one more evaluation counted in; 0 where they are not limited."""
        if self.training.max_minutes is None:
            return 0.0
        spent = time.perf_counter() - self.began + self.evaluation_seconds
        mean: float = self._summed(spent)[0] / self.share.step
        return mean / (60 * self.training.max_minutes)

    def _summed(self, *values: float) -> list[float]:
        """Sums over all processes, the same in each of them."""
        if self.accelerator.num_processes == 1:
            return list(values)
        mine = torch.tensor(values, dtype=torch.float64, device=self.base.device)
        total: Any = self.accelerator.reduce(mine)
        return list(total.tolist())

    def _order(self) -> Iterator[Sequence[Example]]:
        """The rows of each batch, epoch after epoch, each in its own order; the same for the same seed."""
        epoch = 0
        while True:
            generator = torch.Generator().manual_seed(self.training.seed + epoch)
            order = torch.randperm(len(self.rows.train), generator=generator).tolist()
            for start in range(0, len(order), self.training.batch_size):
                yield [self.rows.train[i] for i in order[start : start + self.training.batch_size]]
            epoch += 1

    def _own(self, rows: Sequence[Example]) -> tuple[Batch, float]:
        """This process's rows of a batch and their weight; one row of no weight where there are none."""
        mine = rows[self.share]
        batch = next(batches(mine or rows[:1], len(rows), self.base.pad))
        return batch, float(bool(mine))

    def one_step(self, order: Iterator[Sequence[Example]]) -> dict[str, Any] | None:
        """One optimiser step; None when the loss or the gradient is not finite."""
        began, loss = time.perf_counter(), 0.0
        rate = self.training.rate_at(max((self.state.step + 1) / self.steps, self._spent()))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parts = [next(order) for _ in range(self.training.accumulate)]
        tokens = sum(len(example.ids) for rows in parts for example in rows)
        measured = sum(example.measured for rows in parts for example in rows)
        with self._as_coded():
            for rows in parts:
                batch, weight = self._own(rows)
                with torch.no_grad(), self.reference:
                    hidden, logits = self.base.predictions(batch)
                with self.student.attached:
                    part = self.model(batch, hidden, logits, self.training) * weight / measured
                    self.accelerator.backward(part * self.accelerator.num_processes)  # the mean of all is taken
                loss += float(part.detach())
        loss = self._summed(loss)[0]
        norm = self.accelerator.clip_grad_norm_(self.student.parameters(), self.training.clip)
        if not math.isfinite(loss) or not math.isfinite(float(norm)):
            self.optimizer.zero_grad()
            return None
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - began
        self.state.tokens, self.state.seconds = self.state.tokens + tokens, self.state.seconds + seconds
        return {
            "step": self.state.step + 1, "loss": loss, "learning_rate": rate, "gradient_norm": float(norm),
            "tokens_per_second": tokens / seconds,
        }  # fmt: skip

    def _as_coded(self) -> AbstractContextManager[None]:
        """Where numbers are stored in codes, the step is taken at the codes' values."""
        return self.student.rounded(self.quantiser) if self.codes else nullcontext()

    def _heldout(self) -> float:
        began = time.perf_counter()
        # What was read is what is stored; coding it again might move it.
        present = self.student.rounded(self.quantiser) if self.state.step else nullcontext()
        with torch.no_grad(), present:
            own, size = self.rows.heldout[self.share], self.training.batch_size
            total, tokens = self._summed(*kl_sums(self.base, self.known, self.student.attached, own, size))
        self.evaluation_seconds = time.perf_counter() - began
        return total / tokens

    def _evaluate(self) -> float:
        """Held-out KL of the present state, which becomes the best one where it is lower."""
        kl = self._heldout()
        self.state.stale += 1
        if kl < self.state.lowest:
            self.state.lowest, self.state.kept_step, self.state.stale = kl, self.state.step, 0
            self.best = {name: tensor.detach().clone() for name, tensor in self.student.tensors.items()}
        return kl

    def _result(self) -> Distilled:
        best = {name: tensor.cpu() for name, tensor in self.best.items()}
        codes = self.codes
        if self.state.kept_step:
            trained = {name: best[name] for name in self.student.trained}
            best, codes = best | self.quantiser.round(trained), self.quantiser.encoded(trained)
        form = assemble(self.layout, best).to(self.quantiser.dtype)
        record = TrainingRecord(
            steps=self.state.step,
            kept_step=self.state.kept_step,
            heldout_kl_before=self.state.before,
            heldout_kl_after=self.state.lowest,
            heldout_rows=len(self.rows.heldout),
            training_rows=len(self.rows.train),
            tokens_per_second=self.state.tokens / self.state.seconds if self.state.seconds else 0.0,
            peak_bytes=peak_bytes(self.base.device),
            trained=self.training.train,
            trained_parameters=sum(p.numel() for p in self.student.parameters()),
            device=self.base.device.type,
            processes=self.accelerator.num_processes,
            dtype=str(self.base.model.dtype).removeprefix("torch."),
            options=self.training.to_dict(),
            completions=dict(self.rows.completions) if self.rows.completions else None,
        )
        if self.state.kept_step == 0:
            self.notes.append("no state was better on the held-out rows than the starting one, which is kept")
        return Distilled(form, tuple(self.state.log), record, (*self.rows.notes, *self.notes), codes)

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor that the rest of the run depends on, by key."""
        tensors = {f"now.{name}": tensor for name, tensor in self.student.tensors.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.student.trained.items():
            moments = self.optimizer.state[parameter]  # empty for a module that no token has reached
            tensors |= {f"{key}.{name}": moments[key] for key in MOMENTS if key in moments}
        return tensors

    def go_on(self, checkpoints: Path) -> None:
        """Takes the state of the same run that was interrupted.

        :raises InputError: when it is damaged or its options are others.
        """
        state, tensors = load_state(checkpoints, self.training)
        try:
            with torch.no_grad():
                for name, tensor in self.student.tensors.items():
                    tensor.copy_(tensors[f"now.{name}"])
                    self.best[name].copy_(tensors[f"best.{name}"])
                for name, parameter in self.student.trained.items():
                    if f"{MOMENTS[0]}.{name}" in tensors:
                        self.optimizer.state[parameter] = {
                            "step": torch.tensor(float(state.step)),
                            **{key: tensors[f"{key}.{name}"].to(parameter.device) for key in MOMENTS},
                        }
        except (KeyError, RuntimeError) as error:
            raise not_of_this_run(checkpoints, error) from None
        self.state = state
