"""The number of cores, and work in threads."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def core_count() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


THREADS = min(4, core_count())
"""Threads that decode while a model computes. Pillow, FFmpeg and libsndfile release Python's lock."""


def map_ahead(function: Callable[[T], R], items: Iterable[T], threads: int = THREADS) -> Iterator[R]:
    """`map` in threads, in order. It works only a few items ahead, because a long clip takes much memory."""
    pool = ThreadPoolExecutor(threads)
    futures: deque[Future[R]] = deque()
    try:
        for item in items:
            futures.append(pool.submit(function, item))
            if len(futures) > 2 * threads:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def in_main_thread() -> bool:
    """Whether this is the main thread of the process, the only one that can handle signals."""
    return threading.current_thread() is threading.main_thread()
