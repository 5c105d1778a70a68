"""The loader: step -> batch, in worker processes, exact whatever their number.

The alternation and the order are pure functions, so a worker needs nothing but the number of a step to make that step's
batch. torch's DataLoader does the rest: it hands steps to workers and gives their batches back in order.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.signal_handling import _error_if_any_worker_fails

from openimp.alternation import Alternation, Visit
from openimp.common.errors import UserError
from openimp.common.modality import BadMedia, Modality, Tokens
from openimp.data.batch import Batch, head_key
from openimp.data.order import digest_of, example_rng, permute, rows_at, seed_key
from openimp.data.sources import open_source
from openimp.data.store import DecodedStore
from openimp.data.streams import Stream
from openimp.data.tables import Table, Unreadable
from openimp.data.targets import classes_of, item_of, labels_of, told_by
from openimp.data.templates import all_texts, columns_of, fill
from openimp.recipe.inputs import Input
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Classification, Task

CORPUS_ROWS = 100_000
"""Rows of a source that a tokenizer learns from: the first of a stream, and of a larger table a random part."""


class WorkersFailed(UserError):
    """A worker was killed, or cannot be reached any more."""


@dataclass
class LoadedBatch:
    """What a worker gives for one step.

    Attributes:
        visit: the step.
        batch: its examples.
        bad: (where, why) of each example that could not be read; its neighbour in the batch stands in for it.
        cursor: where a streamed source stands, to go on from there; None for tables.
        digest: names the examples, whatever their order; see `digest_of`.
    """

    visit: Visit
    batch: Batch
    bad: list[tuple[str, str]] = field(default_factory=list)
    cursor: dict[str, Any] | None = None
    digest: int = 0

    def pin_memory(self) -> LoadedBatch:
        """Asked for by the DataLoader, where there is CUDA: only from pinned memory is a copy to the GPU not waited
        for."""
        return replace(self, batch=self.batch.pin_memory())


class StepBatches(Dataset[LoadedBatch]):
    """The batch of each step of a recipe: `dataset[step]`."""

    def __init__(
        self, recipe: Recipe, modalities: dict[str, Modality], progress: Any = None, part: int = 0, parts: int = 1
    ) -> None:
        """Opens the sources, fits the modalities to the training data, and fills the caches.

        Args:
            recipe: what to read.
            modalities: an instance for each modality; those that learn from data are fitted here unless they were.
            progress: wraps an iterable to show its progress, `progress(iterable, description)`.
            part: which of the `parts` equal parts of each batch to make.

        Raises:
            UserError: a source or a column that is not there, or a batch that has no equal parts.
        """
        self.recipe = recipe
        self.modalities = modalities
        self.schedule = Alternation(recipe)
        self.part, self.parts = part, parts
        tasks = {name: task for name, task in recipe.tasks.items() if task.weight}
        for name, task in tasks.items():
            for size in (view.batch_size or task.batch_size for view in task.views):
                if size % parts:
                    raise UserError(f"tasks.{name}: a batch of {size} cannot be dealt out to {parts} processes")
        self.stores: dict[tuple[str, str, str], DecodedStore] = {}
        tables: dict[str, Table | Stream] = {}
        for name, task in tasks.items():
            source = tables.get(task.source) or open_source(task.source, recipe.sources[task.source])
            tables[task.source] = source
            source.require(sorted(self._columns(task)), f"tasks.{name}")
        # Tasks of one streamed source are read at their own pace, so each has its own stream.
        self.sources = {
            name: open_source(task.source, recipe.sources[task.source])
            if isinstance(tables[task.source], Stream)
            else tables[task.source]
            for name, task in tasks.items()
        }
        self.classes = {
            head_key(task.source, objective.label): classes_of(self.sources[name], objective, f"tasks.{name}")
            for name, task in tasks.items()
            for objective in task.objectives
            if isinstance(objective, Classification)
        }
        self._index = {key: {value: i for i, value in enumerate(values)} for key, values in self.classes.items()}
        self.stores = self._build_stores(tasks, progress)

    def fit(self, fitted: Collection[str] = ()) -> None:
        """Lets the modalities learn from the training texts what they must, such as a tokenizer; but not those of the
        stems that are `fitted` already."""
        for name, modality in self.modalities.items():
            if modality.reads_text and modality.stem not in fitted:
                modality.fit(self._corpus(name))

    def fingerprints(self) -> dict[str, str]:
        """Names what each source holds, the media files that tasks read from it included: {source: name}."""
        sources = {source.name: source for source in self.sources.values()}
        media: dict[str, set[str]] = {name: set() for name in sources}
        for task in map(self.recipe.tasks.__getitem__, self.sources):
            for name, spec in task.inputs.items():
                media[task.source] |= set() if self.modalities[name].reads_text else set(spec.columns)
        return {
            name: source.fingerprint_with_files(sorted(media[name]))
            if isinstance(source, Table)
            else source.fingerprint
            for name, source in sources.items()
        }

    def load_cursors(self, cursors: dict[str, Any], changed: Collection[str] = ()) -> dict[str, Any]:
        """Lets streamed tasks go on from where they stood, {task: cursor}, and returns the cursors.

        Those of the `changed` sources begin the next epoch, for a place in a shard means nothing in another one.
        """
        loaded = {}
        for name, cursor in cursors.items():
            source = self.sources[name]
            assert isinstance(source, Stream)
            if source.name in changed:
                cursor = {**cursor, "epoch": cursor["epoch"] + 1, "window": 0, "state": None}
            source.load_cursor(cursor)
            loaded[name] = cursor
        return loaded

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, step: int) -> LoadedBatch:
        visit = self.schedule[step]
        task = self.recipe.tasks[visit.task]
        size = visit.batch // self.parts
        source = self.sources[visit.task]
        columns = sorted(self._columns(task))
        whole = []
        if isinstance(source, Stream):
            whole = source.read(seed_key(self.recipe.seed, visit.task), visit.start, visit.batch)
        key = seed_key(self.recipe.seed, visit.task, "augment")
        told = told_by(task)
        named: list[tuple[str, str]] = []
        for part in range(self.parts):  # Its own part, or if nothing of that can be read, the next process'.
            first = (self.part + part) % self.parts * size
            rows = positions = np.arange(visit.start + first, visit.start + first + size)
            if isinstance(source, Stream):
                examples = whole[first : first + size]
            else:
                rows = rows_at(self.recipe.seed, visit.task, len(source), positions)
                examples = source.rows(rows.tolist(), columns)
            rngs: list[np.random.Generator] = [example_rng(key, int(p), task.views[visit.view].sync) for p in positions]
            refused = ((i, example[column]) for i, example in enumerate(examples) for column in told)
            bad = {i: cell.reason for i, cell in refused if isinstance(cell, Unreadable)}
            arrays = {name: self._read(visit, name, rows.tolist(), examples, rngs, bad) for name in task.inputs}
            # Those of another part are named by its own process.
            named = named or [(source.row_name(int(rows[i])), why) for i, why in sorted(bad.items())]
            if len(bad) < size:
                break
        stand_in = _stand_ins(size, bad, f"tasks.{visit.task}: no example of step {step} could be read", named)
        batch = Batch(
            {name: self._tokens(visit, name, arrays[name], stand_in, rngs) for name in task.inputs},
            {"": torch.from_numpy(rows[stand_in])},
            rows=rows[stand_in].tolist(),
        )
        for objective in task.objectives:
            if isinstance(objective, Classification):
                values = [examples[i][objective.label] for i in stand_in]
                index = self._index[head_key(task.source, objective.label)]
                batch.labels[objective.label] = labels_of(values, index, objective, f"{task.source}.{objective.label}")
            elif objective.same:
                items_of = [item_of(examples[i][objective.same], int(rows[i])) for i in stand_in]
                batch.item_ids[objective.same] = torch.tensor(items_of)
        digest = digest_of(f"{visit.task} {source.row_name(row)}" for row in batch.rows)
        return LoadedBatch(visit, batch, named, source.cursor() if isinstance(source, Stream) else None, digest)

    def _columns(self, task: Task) -> set[str]:
        """The columns of the source that a task reads, less those whose decoded values are in a store."""
        stored = {(m, c) for s, m, c in self.stores if s == task.source}
        columns: set[str] = set()
        for name, spec in task.inputs.items():
            if self.modalities[name].reads_text:
                columns |= set(columns_of(spec.columns))
            else:
                columns |= {column for column in spec.columns if (name, column) not in stored}
        return columns | told_by(task)

    def _read(
        self,
        visit: Visit,
        name: str,
        rows: list[int],
        examples: list[dict[str, Any]],
        rngs: list[np.random.Generator],
        bad: dict[int, str],
    ) -> list[list[np.ndarray]]:
        """The arrays of one modality, `draw` of each example, augmented as the view says. What is `bad` is passed over,
        and what cannot be read becomes so.

        The whole batch goes through one modality before the next, for its code and tables stay in the processor's
        cache. An example has its own randomness, so the order of its draws is the same.
        """
        task, modality = self.recipe.tasks[visit.task], self.modalities[name]
        spec, view = task.inputs[name], task.views[visit.view][name]
        arrays: list[list[np.ndarray]] = []
        for i, (row, example, rng) in enumerate(zip(rows, examples, rngs)):
            arrays.append([])
            try:
                for _ in range(spec.draw if i not in bad else 0):
                    item = self._decode(visit.task, name, spec, view, row, example, rng)
                    arrays[i].append(modality.transform(item, view, rng))
            except BadMedia as error:
                bad[i] = str(error)
        return arrays

    def _decode(
        self, task: str, name: str, spec: Input, view: Any, row: int, example: dict[str, Any], rng: np.random.Generator
    ) -> np.ndarray:
        modality, source = self.modalities[name], self.sources[task]
        if modality.reads_text:
            return modality.decode(fill(spec.columns, example, rng), [view])
        column = spec.columns[int(rng.integers(len(spec.columns)))] if len(spec.columns) > 1 else spec.columns[0]
        store = self.stores.get((source.name, name, column))
        if store is not None:
            return store[row]
        return modality.decode(source.media(example[column]), [view], rng)

    def _tokens(
        self,
        visit: Visit,
        name: str,
        arrays: list[list[np.ndarray]],
        stand_in: list[int],
        rngs: list[np.random.Generator],
    ) -> Tokens:
        task = self.recipe.tasks[visit.task]
        drop_rngs = [rng for rng in rngs for _ in range(task.inputs[name].draw)]
        items = np.stack([array for i in stand_in for array in arrays[i]])
        return self.modalities[name].tokens(items, task.views[visit.view][name], drop_rngs)

    def _build_stores(self, tasks: dict[str, Task], progress: Any) -> dict[tuple[str, str, str], DecodedStore]:
        """Decodes the media columns of each cached source once, at the size of the largest view that reads them."""
        views: dict[tuple[str, str, str], list[Any]] = {}
        for task in tasks.values():
            for name, spec in task.inputs.items():
                for column in spec.columns if not self.modalities[name].reads_text else []:
                    views.setdefault((task.source, name, column), []).extend(view[name] for view in task.views)
        tables = {tasks[name].source: source for name, source in self.sources.items()}
        stores = {}
        for (source, name, column), seen in views.items():
            table, cache = tables[source], self.recipe.sources[source].cache
            if isinstance(table, Table) and cache != "none":
                stores[source, name, column] = DecodedStore.build(
                    table, self.modalities[name], column, seen, where=cache, progress=progress
                )
        return stores

    def _corpus(self, name: str) -> Iterator[list[str]]:
        for task_name, source in self.sources.items():
            spec = self.recipe.tasks[task_name].inputs.get(name)
            if spec is None:
                continue
            columns = columns_of(spec.columns)
            if isinstance(source, Stream):
                rows: Iterable[dict[str, Any]] = _beginning(source, seed_key(self.recipe.seed, task_name), columns)
            else:
                numbers = np.arange(len(source))
                if len(numbers) > CORPUS_ROWS:
                    key = seed_key(self.recipe.seed, task_name, "corpus")
                    numbers = np.sort(permute(numbers[:CORPUS_ROWS], len(source), key))
                parts = (numbers[part].tolist() for part in _chunks(len(numbers)))
                rows = chain.from_iterable(source.rows(part, columns) for part in parts)
            yield from all_texts(spec.columns, rows)


def make_loader(dataset: StepBatches, first: int, last: int | None = None) -> Iterator[LoadedBatch]:
    """Batches of the steps from `first` to `last` (to the end), in order, made by the recipe's workers.

    Raises:
        UserError: no example of a batch can be read, or a label is none of the classes.
        WorkersFailed: a worker died.
    """
    train = dataset.recipe.train
    workers = train.num_workers
    loader: DataLoader[LoadedBatch | UserError] = DataLoader(
        _Told(dataset),
        batch_size=None,
        sampler=range(first, len(dataset) if last is None else last),
        num_workers=workers,
        prefetch_factor=train.prefetch_factor if workers else None,
        worker_init_fn=_quiet_worker,
        # Forked workers share the decoded caches; from Python 3.14 on, Linux would not fork by itself.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        pin_memory=torch.cuda.is_available(),
    )
    watched = workers and hasattr(signal, "SIGCHLD")
    for loaded in _workers_watched(loader) if watched else loader:
        if isinstance(loaded, UserError):
            raise loaded
        yield loaded


def _workers_watched(loader: DataLoader[LoadedBatch | UserError]) -> Iterator[LoadedBatch | UserError]:
    """The loader's batches; a worker's death is told while one is waited for.

    torch tells of it by a signal handler that raises wherever the training process happens to be: in the middle of an
    update, too, after which nothing could be saved. So that handler is taken out again, and the same is asked here.
    """
    before = signal.getsignal(signal.SIGCHLD)
    batches: Iterator[LoadedBatch | UserError] | None = None
    for _ in range(len(loader)):  # Once all are there, a death is of no matter.
        try:
            batches = batches or iter(loader)
            # Of a batch that the dead worker has written half of, the rest would be waited for without end.
            signal.signal(signal.SIGCHLD, lambda *_: _error_if_any_worker_fails())
            _error_if_any_worker_fails()
            loaded = next(batches)
        # Those beside torch's own come from a batch that was the dead worker's.
        except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker (pid"):
                raise
            reason = str(error).split(". ")[0] or "the connection to one ended"
            raise WorkersFailed(
                f"train.num_workers: a worker that makes batches died: {reason}; if it ran out of memory, lower "
                "train.num_workers or train.prefetch_factor"
            ) from None
        finally:
            signal.signal(signal.SIGCHLD, before)
        yield loaded


@dataclass(frozen=True)
class _Told(Dataset["LoadedBatch | UserError"]):
    """Gives a user's error instead of raising it: the DataLoader would put a worker's traceback into its message.

    Batches are made with one thread, as workers have it: the last bits of a spectrogram depend on the number.
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


def _quiet_worker(_: int) -> None:
    # Ctrl-C, and often SIGTERM, reach the whole process group; only the training process decides what they mean.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setsid"):
        os.setsid()


def _beginning(source: Stream, key: int, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The first rows of a stream, as many as a tokenizer learns from, but hardly more than an epoch."""
    start = source.cursor()
    for part in _chunks(CORPUS_ROWS, 256):
        yield from source.read(key, part[0], len(part), columns)
        if source.cursor()["epoch"]:
            break
    # Back to where it stood: forked workers would share the files that it has open now.
    source.load_cursor(start)


def _chunks(n: int, size: int = 4096) -> Iterator[list[int]]:
    for start in range(0, n, size):
        yield list(range(start, min(start + size, n)))


def _stand_ins(size: int, bad: Collection[int], message: str, named: list[tuple[str, str]]) -> list[int]:
    """For each place of the batch the index of a readable example: itself, or the next one that is."""
    good = [i for i in range(size) if i not in bad]
    if not good:
        raise UserError(f"{message}; first: {named[0][0]}: {named[0][1]}")
    return [good[int(np.searchsorted(good, i)) % len(good)] if i in bad else i for i in range(size)]
