"""Loads batches in worker processes. The number of workers does not change the batches.

Each worker makes its part of every batch, so that it reads the same lanes (sequences of shards) of a stream in every
step. So an item of torch's DataLoader is a part of a batch. The DataLoader gives item i to worker i % workers and
returns the items in order: item i is part i % workers of step i // workers.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import TracebackType

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils.signal_handling import _error_if_any_worker_fails

from openimp.common.errors import UserError, one_line
from openimp.common.threads import in_main_thread
from openimp.data.loaded_batch import LoadedBatch
from openimp.data.step_batches import StepBatches


class WorkersFailed(UserError):
    """A worker process died, or the connection to it broke."""


def load_batches(batches: StepBatches, start: int, stop: int | None = None) -> Iterator[LoadedBatch]:
    """Yields the batches of the steps from `start` to `stop` - 1; if `stop` is None, to the last step.

    Raises:
        UserError: too many consecutive examples cannot be read, a label is not among the classes, or a disk or shared
            memory failed.
        WorkersFailed: a worker died.
    """
    train = batches.data.recipe.train
    workers = train.num_workers
    parts_per_batch = max(1, workers)
    stop = len(batches) if stop is None else stop
    _ = batches.vector_tasks  # Read before workers are forked, so that they share it.
    loader: DataLoader[LoadedBatch | UserError] = DataLoader(
        _Parts(batches, parts_per_batch),
        batch_size=None,
        sampler=range(start * parts_per_batch, stop * parts_per_batch),
        num_workers=workers,
        prefetch_factor=train.prefetch_factor if workers else None,
        worker_init_fn=_init_worker,
        # Forked workers share the decoded media of sources with `cache: memory`. Python 3.14 would not fork by default.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        pin_memory=torch.cuda.is_available(),
    )
    can_watch = workers and hasattr(signal, "SIGCHLD") and in_main_thread()
    parts_of_batch = []
    for part in _watch_workers(loader) if can_watch else loader:
        if isinstance(part, UserError):
            raise part
        parts_of_batch.append(part)
        if len(parts_of_batch) == parts_per_batch:
            yield LoadedBatch.merged(parts_of_batch)
            parts_of_batch = []


def _watch_workers(loader: DataLoader[LoadedBatch | UserError]) -> Iterator[LoadedBatch | UserError]:
    """Yields the loader's parts of batches, and reports a dead worker only while it waits for a part.

    torch's SIGCHLD handler raises wherever the training process is. In the middle of an update, that would make the
    model unfit to be saved. So torch's handler is removed. Another one, which raises the same error, is installed only
    while the loader waits for a part.
    """
    outer_handler = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL  # `getsignal` returns None for C code.
    iterator: Iterator[LoadedBatch | UserError] | None = None
    # A counted loop, because the `next` that ends the iterator would report a worker that died after its last part.
    for _ in range(len(loader)):
        try:
            iterator = iterator or iter(loader)  # Inside `try`: this starts the workers and installs torch's handler.
            # Without the handler, `next` would wait forever if a worker died while it wrote a part.
            signal.signal(signal.SIGCHLD, lambda *_: _error_if_any_worker_fails())
            _error_if_any_worker_fails()  # A worker may have died before the handler was installed.
            part = next(iterator)
            # Not only in `finally`: the handler may raise until it is removed, and `except` must catch its error.
            signal.signal(signal.SIGCHLD, outer_handler)
        # torch raises RuntimeError. Unpickling a part from the dead worker raises the other errors.
        except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker (pid"):
                raise
            # Without torch's advice, which follows the first sentence.
            reason = str(error).split(". ")[0] or "the connection to it broke"
            raise WorkersFailed(
                f"train.num_workers: a data worker died: {reason}; if it ran out of memory, lower train.num_workers or "
                "train.prefetch_factor"
            ) from None
        finally:
            signal.signal(signal.SIGCHLD, outer_handler)
        yield part


@dataclass(frozen=True)
class _Parts(Dataset["LoadedBatch | UserError"]):
    """The data set of the DataLoader: the parts of all batches.

    An item may be a UserError: an error is returned instead of raised, because an error that a worker raises would end
    the training without a checkpoint. An item is made with one thread, even in the training process, because the number
    of threads changes the last bits of a spectrogram.
    """

    batches: StepBatches
    parts_per_batch: int

    def __len__(self) -> int:
        return len(self.batches) * self.parts_per_batch

    def __getitem__(self, item: int) -> LoadedBatch | UserError:
        step, part_index = divmod(item, self.parts_per_batch)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            part = self.batches.part(step, part_index, self.parts_per_batch)
            return part if get_worker_info() is None else _shared(part)
        except UserError as error:
            return error
        except Exception as error:  # Of a file system, a network or a decoder.
            traceback.print_exc()
            return UserError(f"the data of step {step}: {type(error).__name__}: {error}")
        finally:
            torch.set_num_threads(threads)


def _shared(part: LoadedBatch) -> LoadedBatch:
    """A worker's part in shared memory.

    Otherwise, the thread that sends the part would move it to shared memory. An error of that thread is lost, and the
    training would wait forever.
    """
    try:
        return replace(part, batches=[batch.share_memory() for batch in part.batches])
    except RuntimeError as error:
        raise UserError(
            f"the data of step {part.visit.step}: {one_line(error)}; enlarge /dev/shm (docker run --shm-size), or "
            "lower train.num_workers or train.prefetch_factor"
        ) from None


def _init_worker(_: int) -> None:
    # Ctrl-C and often SIGTERM reach the whole process group, but only the training process must act on them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setsid"):
        os.setsid()
    sys.excepthook = _print_unless_disconnected


def _print_unless_disconnected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints the traceback of an exception in a worker, unless it only says that the training process has left.

    When a worker dies, the training process stops at once, perhaps while it receives a part from a living worker. The
    sending thread of the living worker (`multiprocessing.resource_sharer`) then loses its connection. Its traceback
    would hide the error about the dead worker.
    """
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)
