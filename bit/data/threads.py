"""Work done ahead of its consumer by threads, in order, and how long the consumer waits for it."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Like `map(function, items)`, with `workers` threads that run at most workers + 1 items ahead.

    An exception in a thread is raised here, when its turn comes. A consumer that stops early
    (break, exception, `close()`) cancels what has not begun and waits for what has.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    return _in_order(function, iter(items), workers)


def _in_order(
    function: Callable[[Item], Result], items: Iterator[Item], workers: int
) -> Iterator[Result]:
    with ThreadPoolExecutor(workers, thread_name_prefix="bit-data") as pool:
        pending = deque(pool.submit(function, item) for item in islice(items, workers + 1))
        try:
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(function, item) for item in islice(items, 1))
                yield result
        finally:
            for future in pending:
                future.cancel()


class Clock:
    """Adds up the seconds that a consumer waits for the next item of what it iterates over."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def timed(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, timed."""
        iterator = iter(items)
        while True:
            began = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._seconds += time.perf_counter() - began
            yield item

    def lap(self) -> float:
        """Seconds waited since the last lap."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
