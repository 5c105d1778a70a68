"""The loader: makes batches in worker processes. The number of workers does not change them.

torch's DataLoader hands out the steps to the workers and returns the batches in order.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.signal_handling import _error_if_any_worker_fails

from openimp.common.errors import UserError
from openimp.data.step_batches import LoadedBatch, StepBatches


class WorkersFailed(UserError):
    """A worker process was killed, or the connection to it ended."""


def make_loader(dataset: StepBatches, first: int, last: int | None = None) -> Iterator[LoadedBatch]:
    """The batches of the steps `first` to `last` - 1 (by default, to the end), made by the recipe's workers.

    Raises:
        UserError: no example of a batch can be read, or a label is not among the classes.
        WorkersFailed: a worker died.
    """
    train = dataset.recipe.train
    workers = train.num_workers
    loader: DataLoader[LoadedBatch | UserError] = DataLoader(
        _ReturnErrors(dataset),
        batch_size=None,
        sampler=range(first, len(dataset) if last is None else last),
        num_workers=workers,
        prefetch_factor=train.prefetch_factor if workers else None,
        worker_init_fn=_init_worker,
        # Forked workers share the decoded caches. From Python 3.14 on, fork is no longer the default on Linux.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        pin_memory=torch.cuda.is_available(),
    )
    watched = workers and hasattr(signal, "SIGCHLD")
    for loaded in _watch_workers(loader) if watched else loader:
        if isinstance(loaded, UserError):
            raise loaded
        yield loaded


def _watch_workers(loader: DataLoader[LoadedBatch | UserError]) -> Iterator[LoadedBatch | UserError]:
    """The loader's batches. A worker's death raises an error only while a batch is awaited.

    torch installs a signal handler that raises wherever the training process happens to be. In the middle of an
    update, nothing could be saved after that. So torch's handler is removed between batches.
    """
    before = signal.getsignal(signal.SIGCHLD)
    batches: Iterator[LoadedBatch | UserError] | None = None
    for _ in range(len(loader)):  # After the last batch a worker's death does not matter.
        try:
            batches = batches or iter(loader)
            # Without the handler, a batch that a dying worker has only half written would be awaited forever.
            signal.signal(signal.SIGCHLD, lambda *_: _error_if_any_worker_fails())
            _error_if_any_worker_fails()
            loaded = next(batches)
        # torch raises RuntimeError. The other errors come from unpickling a batch of the dead worker.
        except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker (pid"):
                raise
            reason = str(error).split(". ")[0] or "the connection to it ended"
            raise WorkersFailed(
                f"train.num_workers: a data worker died: {reason}; if it ran out of memory, lower train.num_workers or "
                "train.prefetch_factor"
            ) from None
        finally:
            signal.signal(signal.SIGCHLD, before)
        yield loaded


@dataclass(frozen=True)
class _ReturnErrors(Dataset["LoadedBatch | UserError"]):
    """Returns a UserError instead of raising it, because the DataLoader would add a worker's traceback to its message.

    Batches are made with one thread even outside of a worker, because the last bits of a spectrogram depend on the
    number of threads.
    """

    batches: StepBatches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> LoadedBatch | UserError:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self.batches[step]
        except UserError as error:
            return error
        finally:
            torch.set_num_threads(threads)


def _init_worker(_: int) -> None:
    # Ctrl-C, and often SIGTERM, reach the whole process group. Only the training process decides what they mean.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setsid"):
        os.setsid()
