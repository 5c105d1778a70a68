"""Stopping a training run between two steps: after a signal, bad data, or a checkpoint that could not be written."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from openimp.common.errors import UserError
from openimp.data.loader import WorkersFailed
from openimp.parallel import distributed

T = TypeVar("T")


class Stopped(Exception):
    """A stop was requested. It is raised between two steps, so that a checkpoint can be saved."""


class Stop:
    """Knows whether the training should stop: a signal was received, or `reason` returns True, as for a failed save."""

    def __init__(self, reason: Callable[[], bool]) -> None:
        self.requested, self.reason = False, reason

    def watch(self, items: Iterable[T], _: str = "") -> Iterator[T]:
        """Yields the items, and raises `Stopped` before the next one once a stop is requested.

        Whatever stops one rank, a signal or bad data, stops all ranks at the same step.
        """
        iterator = iter(items)
        while True:
            reason: str | None = None
            try:
                item = next(iterator)
            except StopIteration:
                return
            except WorkersFailed as error:
                # The signal may have killed the loader's workers too.
                reason = "" if self.requested else str(error)
            except UserError as error:
                reason = str(error)
            if reason is None and (self.requested or self.reason()):
                reason = ""
            if reasons := [each for each in distributed.all_gather_object(reason) if each is not None]:
                raise UserError(max(reasons)) if max(reasons) else Stopped
            yield item


@contextmanager
def stop_signals(reason: Callable[[], bool]) -> Iterator[Stop]:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a stop after the step. A second Ctrl-C interrupts at once."""
    stop = Stop(reason)

    def note(number: int, _: Any) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.requested = True
        if number == signal.SIGINT:
            # Not print: the signal may have interrupted one.
            os.write(2, b"\nstopping after this step; press Ctrl-C again to exit at once\n")

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it.
        numbers.append(signal.SIGHUP)  # The terminal was closed.
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
