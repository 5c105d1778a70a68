"""Stopping a training run between two steps: after a signal, bad data, or a checkpoint that could not be written."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar, cast

from openimp.common.errors import UserError
from openimp.data.loader import WorkersFailed
from openimp.data.step_batches import LoadedBatch
from openimp.parallel import distributed

T = TypeVar("T")


class Stopped(Exception):
    """A stop was requested. It is raised between two steps, so that a checkpoint can be saved."""


class Stop:
    """Knows whether the training should stop: a signal was received, or `reason` returns True, as for a failed save."""

    def __init__(self, reason: Callable[[], bool]) -> None:
        self.requested = False
        self.reason = reason

    def watch(self, items: Iterable[T], _: str = "") -> Iterator[T]:
        """Yields the items, and raises `Stopped` before the next one once a stop is requested on any rank."""
        for item, reason in self._with_reasons(items):
            stop_all_ranks(reason)
            yield cast(T, item)

    def watch_steps(
        self, batches: Iterable[LoadedBatch], first: int, placeholder: Callable[[int], LoadedBatch]
    ) -> Iterator[LoadedBatch]:
        """Yields the batches of the steps from `first` on, and stops between two steps, but without communication.

        Of several ranks, one alone cannot stop before a step, because the others would wait for it in the step's
        collectives. So its batch names the reason: then no rank applies the step, and all ranks stop when they notice
        that (`Trainer.confirm`). If loading has failed, `placeholder(step)` takes the place of the batch.
        """
        for step, (loaded, reason) in enumerate(self._with_reasons(batches), first):
            if distributed.world_size() == 1:
                stop_all_ranks(reason)
            yield replace(loaded or placeholder(step), stop=reason)

    def _with_reasons(self, items: Iterable[T]) -> Iterator[tuple[T | None, str | None]]:
        """Yields each item and this rank's reason to stop before it: an error, "" for a request, or None.

        An item that cannot be had is None, and so are all items after it.
        """
        iterator = iter(items)
        failure: str | None = None
        while True:
            item: T | None = None
            try:
                item = next(iterator) if failure is None else None
            except StopIteration:
                return
            except WorkersFailed as error:
                # The signal may have killed the loader's workers too.
                failure = "" if self.requested else str(error)
            except UserError as error:
                failure = str(error)
            yield item, "" if failure is None and (self.requested or self.reason()) else failure


def stop_all_ranks(reason: str | None) -> None:
    """Raises on all ranks if any of them has a reason: `Stopped`, or a UserError if the reason is not empty.

    Every rank must call this.
    """
    if reasons := [text for text in distributed.all_gather_object(reason) if text is not None]:
        raise UserError(max(reasons)) if max(reasons) else Stopped


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
