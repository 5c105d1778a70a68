"""Stopping a training run between two steps: after a signal, bad data, or a checkpoint that could not be written."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar, cast

from openimp.common.errors import UserError
from openimp.common.threads import in_main_thread
from openimp.data.loaded_batch import LoadedBatch
from openimp.data.loader import WorkersFailed
from openimp.parallel import distributed

T = TypeVar("T")


class Interrupted(Exception):
    """A stop was requested. It is raised between two steps, so that a checkpoint can be saved."""


class Stop:
    """Whether the training should stop: a signal was received, or `must_stop()` is True, for example after a failed
    save."""

    def __init__(self, must_stop: Callable[[], bool]) -> None:
        self.requested = False  # by a signal
        self.must_stop = must_stop

    def watch(self, items: Iterable[T], _: str = "") -> Iterator[T]:
        """Yields the items, and raises `Interrupted` before the next one once a stop is requested on any rank."""
        for item, reason in self._with_reasons(items):
            raise_if_any_rank_stops(reason)
            yield cast(T, item)

    def watch_steps(
        self, batches: Iterable[LoadedBatch], first_step: int, placeholder: Callable[[int], LoadedBatch]
    ) -> Iterator[LoadedBatch]:
        """Yields the batches of the steps from `first_step` on, and stops between two steps, without communication.

        A rank cannot stop alone, because the others would wait for it in the step's collectives. So its batch carries
        the reason: no rank applies the step, and all ranks stop in `Trainer.confirm`. If loading has failed,
        `placeholder(step)` takes the place of the batch.
        """
        for step, (loaded, reason) in enumerate(self._with_reasons(batches), first_step):
            if distributed.world_size() == 1:
                raise_if_any_rank_stops(reason)
            yield replace(loaded or placeholder(step), stop_reason=reason)

    def _with_reasons(self, items: Iterable[T]) -> Iterator[tuple[T | None, str | None]]:
        """Yields each item and this rank's reason to stop before it: an error, "" for a request, or None.

        From the first error on, all items are None.
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
            if failure is None and (self.requested or self.must_stop()):
                yield item, ""
            else:
                yield item, failure


def raise_if_any_rank_stops(reason: str | None) -> None:
    """Raises on all ranks if any of them has a reason: `Interrupted`, or a UserError if the reason is not empty.

    Every rank must call this.
    """
    reasons = [text for text in distributed.all_gather_object(reason) if text is not None]
    if not reasons:
        return
    error = max(reasons)  # Any error comes before "".
    raise UserError(error) if error else Interrupted


@contextmanager
def stop_signals(must_stop: Callable[[], bool]) -> Iterator[Stop]:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a stop after the step. A second Ctrl-C interrupts at once.

    Only the main thread of a process can handle signals. In another thread, only `must_stop` stops the training.
    """
    stop = Stop(must_stop)
    if not in_main_thread():
        yield stop
        return

    def request_stop(number: int, _: Any) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.requested = True
        if number == signal.SIGINT:
            # Not print: the signal may have interrupted one.
            with suppress(OSError):  # A `tee` behind a pipe has received the signal, too, and may have ended.
                os.write(2, b"\nstopping after this step; press Ctrl-C again to exit at once\n")

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it.
        numbers.append(signal.SIGHUP)  # The terminal was closed.
    previous_handlers = {number: signal.signal(number, request_stop) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in previous_handlers.items():
            if signal.getsignal(number) == request_stop:  # Not if `report_dead_ranks` ignores the signal since.
                signal.signal(number, handler)
