"""Modules are independent and their matrices thin, so they are spread over cores, each operation on one thread.

Threads within an operation gain little on thin matrices and lose much on a busy machine, where they wait for each other.
Results come in the order of the items whatever finishes first and no operation is split, so the numbers don't depend on how
many cores there are.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TypeVar

import torch

from bslora_convert.process.memory import give_back

Item = TypeVar("Item")
Result = TypeVar("Result")

TIDIED = 32  # modules after which freed memory is given back: what it costs is nothing beside their work
AHEAD = 2  # items in flight for each worker: enough to keep it busy, few enough to hold little memory

_workers: ContextVar[int] = ContextVar("workers", default=1)


@contextmanager
def modules_over_cores() -> Iterator[None]:
    """Within it, operations take one thread, and `each` as many workers as operations would have had threads."""
    cores = torch.get_num_threads()
    token = _workers.set(cores)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(cores)
        _workers.reset(token)


@cache
def _pool(workers: int, process: int) -> ThreadPoolExecutor:
    """The workers of this process: threads are slow to start beside what they do, so they are kept."""
    return ThreadPoolExecutor(workers, "bslora", initializer=torch.set_num_threads, initargs=(1,))


def each(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function` of every item, in order, a few items at a time; one after the other outside of `modules_over_cores`."""
    workers = _workers.get()
    if workers == 1:
        yield from _tidy(map(function, items))
        return
    yield from _tidy(_over(workers, function, items))


def _over(workers: int, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    pool = _pool(workers, os.getpid())
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= AHEAD * workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _tidy(results: Iterator[Result]) -> Iterator[Result]:
    """The same; the memory of what their making left behind is given back now and then."""
    count = 0
    for count, result in enumerate(results, 1):
        yield result
        if count % TIDIED == 0:
            give_back()
    if count > TIDIED and count % TIDIED:
        give_back()
