"""Modules are independent and their matrices thin, so they are spread over cores, each operation on one thread.

Results come in the order of the items whatever finishes first, and no operation is split between threads, so the numbers
don't depend on how many cores there are.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2  # items in flight for each worker: enough to keep it busy, few enough to hold little memory


@cache
def _pool(cores: int, process: int) -> ThreadPoolExecutor:
    """The workers of this process: threads are slow to start beside what they do, so they are kept."""
    return ThreadPoolExecutor(cores, "bslora", initializer=torch.set_num_threads, initargs=(1,))


def each(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function` of every item, in order, a few items at a time."""
    cores = torch.get_num_threads()
    if cores == 1:
        yield from map(function, items)
        return
    pool = _pool(cores, os.getpid())
    torch.set_num_threads(1)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= AHEAD * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        torch.set_num_threads(cores)
