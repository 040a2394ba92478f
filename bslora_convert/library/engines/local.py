"""Processes on this machine, one thread each; a worker that dies takes its own item with it and nothing else.

Jobs in flight are bounded by memory: each is taken to need `MEMORY_FACTOR` times its file, its base model, and what a process
itself needs. A worker keeps its base model for the next job of the same one, so an idle worker's counts as well.
"""

import multiprocessing
import signal
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from bslora_convert.behaviour.loaded import base_kept, keep_base
from bslora_convert.library.jobs import Job, Result, Work, failure
from bslora_convert.library.options import BASE
from bslora_convert.process.interrupt import raise_interrupt
from bslora_convert.process.quiet import quiet_as_the_parent

MEMORY_FACTOR = 8  # of the weights file: float32 copies, the form, what is read back
BASE_FACTOR = 2  # of the base's files: half precision is read as float32 on a CPU
PROCESS_BYTES = 500_000_000  # Python, torch and matplotlib
GRACE = 20.0  # seconds in which workers may clean up after an interrupt


@dataclass(slots=True)
class Worker:
    """A process, the job that it has, and the base model that it keeps: its name and its bytes in memory."""

    process: Any
    pipe: Connection
    job: Job | None = None
    base: str | None = None
    kept: int = 0

    @property
    def used(self) -> int:
        """Bytes that it is taken to hold."""
        return self.kept + (_need(self.job) if self.job else 0)

    def give(self, job: Job) -> None:
        """Has it do a job, whose base model it keeps from then on."""
        self.job = job
        if job.base_bytes:
            self.base, self.kept = _base(job), BASE_FACTOR * job.base_bytes


def run_local(work: Work, jobs: Sequence[Job], workers: int) -> Generator[Result, None, None]:
    """Runs jobs in `workers` processes; 0 runs them in this one."""
    if workers == 0:
        with base_kept():
            yield from map(work, jobs)
        return
    waiting = deque(jobs)
    running: list[Worker] = []
    room = _memory()
    try:
        while waiting or any(worker.job for worker in running):
            _hand_out(work, waiting, running, min(workers, len(jobs)), room)
            ready = wait([worker.pipe for worker in running if worker.job])
            for worker in [worker for worker in running if worker.pipe in ready]:
                assert worker.job is not None  # only pipes of busy workers were waited for
                try:
                    result = worker.pipe.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    running.remove(worker)
                    result = failure(worker.job, "failed", "WorkerDied", _how(worker.process.exitcode))
                worker.job = None
                yield result
    finally:
        _stop(running)


def _hand_out(work: Work, waiting: deque[Job], running: list[Worker], workers: int, room: int) -> None:
    """Gives jobs to idle workers for as long as memory lasts; one job is always in flight."""
    while waiting:
        job = waiting[0]
        busy = [worker for worker in running if worker.job]
        free = [worker for worker in running if not worker.job]
        idle = next((worker for worker in free if worker.base == _base(job)), next(iter(free), None))
        base = BASE_FACTOR * job.base_bytes or (idle.kept if idle else 0)
        used = sum(worker.used for worker in running if worker is not idle) + _need(job) + base
        if len(busy) >= workers or (busy and used > room):
            return
        if idle is None:
            idle = _start(work)
            running.append(idle)
        idle.give(waiting.popleft())
        try:
            idle.pipe.send(idle.job)
        except OSError:  # it died while idle: its pipe says so when it is waited for
            continue


def _start(work: Work) -> Worker:
    """A fresh process; spawned, because threads of torch don't survive a fork."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(work, theirs), daemon=True)
    process.start()
    theirs.close()
    return Worker(process, ours)


def _work(work: Work, pipe: Connection) -> None:
    """A worker's life: jobs in, results out, until the other end is gone."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's goes to everyone; the parent decides
    signal.signal(signal.SIGTERM, raise_interrupt)
    torch.set_num_threads(1)
    quiet_as_the_parent()
    keep_base()
    while True:
        try:
            job = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            pipe.send(work(job))
        except (KeyboardInterrupt, BrokenPipeError):
            return


def _stop(running: Sequence[Worker]) -> None:
    """Idle workers see their pipe close; busy ones are told to stop and clean up, and killed if they don't."""
    for worker in running:
        if worker.job is not None:
            worker.process.terminate()
        worker.pipe.close()
    for worker in running:
        worker.process.join(GRACE)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _need(job: Job) -> int:
    return MEMORY_FACTOR * job.bytes + PROCESS_BYTES


def _base(job: Job) -> str | None:
    return job.recipe.get(BASE)


def _memory() -> int:
    """Bytes that jobs in flight may take together."""
    import psutil

    return int(0.8 * psutil.virtual_memory().available)


def _how(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name if -exitcode in set(signal.Signals) else str(-exitcode)
        hint = "; the system may have run out of memory" if name == "SIGKILL" else ""
        return f"the worker was ended by {name}{hint}"
    return f"the worker ended with code {exitcode}"
