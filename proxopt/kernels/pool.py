"""A small thread pool for compiled loops, which release the GIL.

numba's own threads (``parallel=True``) abort the process when two threads launch loops at a time or after a fork.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_size = 0


def run(function: Callable[..., Any], parts: Sequence[tuple[Any, ...]], threads: int) -> None:
    """Call ``function(*part)`` for every part, on at most ``threads`` threads, the calling one among them.

    Returns when all calls have returned; raises the first error of one.
    """
    threads = min(threads, len(parts))
    if threads <= 1:
        for part in parts:
            function(*part)
        return
    remaining = iter(parts)
    taking = threading.Lock()

    def work() -> None:
        while True:
            with taking:
                part = next(remaining, None)
            if part is None:
                return
            function(*part)

    helpers: list[Future[None]] = []
    try:
        try:
            for _ in range(threads - 1):
                helpers.append(_workers(threads - 1).submit(work))
        except RuntimeError:  # no more threads: the limit of the process is reached, or the interpreter is shutting down
            pass
        work()
    finally:  # the memory must stay until all have returned, also where the calling thread is interrupted
        errors = [helper.exception() for helper in helpers]
    for error in errors:
        if error is not None:
            raise error


def _workers(count: int) -> ThreadPoolExecutor:
    global _pool, _size
    with _lock:
        if _pool is None or _size < count:
            # the smaller one finishes what it was given, and its threads end when nothing refers to it any more
            _pool, _size = ThreadPoolExecutor(count, thread_name_prefix="proxopt"), count
        return _pool


def _after_fork() -> None:
    """Forget the threads of the parent, which do not exist in a forked child."""
    global _lock, _pool, _size
    _lock, _pool, _size = threading.Lock(), None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
