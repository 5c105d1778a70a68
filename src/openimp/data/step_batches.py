"""`StepBatches`: the data set that holds one batch for each step of a recipe.

The alternation and the order of examples are pure functions of the recipe. So a worker needs only the number of a step
to make its batch, and communicates with no other worker or rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from openimp.alternation import Alternation, Visit
from openimp.common.errors import UserError
from openimp.common.modality import BadMedia, Modality
from openimp.data.batch import Batch, head_key
from openimp.data.order import batch_digest, example_rng, permute, rows_at, seed_key
from openimp.data.sources import open_source
from openimp.data.store import DecodedStore, Progress
from openimp.data.streams import Stream
from openimp.data.tables import Table, Unreadable
from openimp.data.targets import classes_of, item_id, labels_of, target_columns
from openimp.data.templates import all_texts, columns_of, fill
from openimp.parallel.distributed import ranks_on_node, run_on_rank_zero
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Classification, Task

CORPUS_ROWS = 100_000
"""Maximum number of rows per task to train a tokenizer: the first of a stream, or a random sample of a table."""


@dataclass
class LoadedBatch:
    """This rank's part of a step's batch, and what the training loop must know about it.

    Attributes:
        visit: the step, with its task and view.
        batch: this rank's examples.
        bad: (row name, reason) of each example that could not be read. Another example replaces it in the batch.
        cursor: the position from which the task's stream resumes; None for tables.
        digest: a hash of the examples, whatever their order; see `batch_digest`.
    """

    visit: Visit
    batch: Batch
    bad: list[tuple[str, str]] = field(default_factory=list)
    cursor: dict[str, Any] | None = None
    digest: int = 0

    def pin_memory(self) -> LoadedBatch:
        """The DataLoader calls this if there is CUDA: only copies from pinned memory are asynchronous."""
        return replace(self, batch=self.batch.pin_memory())


class StepBatches(Dataset[LoadedBatch]):
    """`dataset[step]` makes this rank's part of the batch of a step.

    Attributes:
        sources: the opened source of each task with a weight above 0, by task.
        classes: the classes of each classification head in the order of its outputs, by `head_key`.
        stores: the decoded media of each cached column, by (source, modality, column).
    """

    def __init__(
        self,
        recipe: Recipe,
        modalities: dict[str, Modality],
        progress: Progress | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Opens the sources, looks up the classes and decodes the media of cached sources.

        Args:
            modalities: by name; those that learn from texts need `fit` or `load_state` before the first batch.
            progress: `progress(iterable, description)` wraps an iterable to show progress.
            rank, world_size: each batch is divided into `world_size` equal parts, of which this is number `rank`.

        Raises:
            UserError: a source or a column is missing, a label fits no class, or a batch cannot be divided equally.
        """
        self.recipe = recipe
        self.modalities = modalities
        self.schedule = Alternation(recipe)
        self.rank, self.world_size = rank, world_size
        self.stores: dict[tuple[str, str, str], DecodedStore] = {}
        self.sources: dict[str, Table | Stream] = {}
        self.classes: dict[str, list[Any]] = {}
        tables: dict[str, Table] = {}
        tasks = {name: task for name, task in recipe.tasks.items() if task.weight}
        for name, task in tasks.items():
            for size in (view.batch_size or task.batch_size for view in task.views):
                if size % world_size:
                    raise UserError(f"tasks.{name}: batch_size {size} is not a multiple of {world_size} ranks")
        for name, task in tasks.items():
            source = tables.get(task.source) or open_source(task.source, recipe.sources[task.source])
            source.require(sorted(self._columns(task)), f"tasks.{name}")
            if isinstance(source, Table):  # Tasks do not share a stream, because each has its own position in it.
                tables[task.source] = source
            self.sources[name] = source
        for name, source in self.sources.items():
            for objective in recipe.tasks[name].objectives:
                if isinstance(objective, Classification):
                    head = head_key(source.name, objective.label)
                    self.classes[head] = classes_of(source, objective, f"tasks.{name}")
        self._index = {key: {value: i for i, value in enumerate(values)} for key, values in self.classes.items()}
        for table in tables.values():
            cache = recipe.sources[table.name].cache
            if cache == "memory" and ranks_on_node() > 1:
                cache = "disk"  # Ranks share the pages of a file.
            if cache != "none":
                for (name, column), views in self._media_views(table.name).items():
                    key = table.name, name, column
                    self.stores[key] = DecodedStore.build(table, modalities[name], column, views, cache, progress)

    def fit(self, fitted_stems: Collection[str] = ()) -> None:
        """Fits the modalities that read text to the training texts, on rank 0, and gives all ranks what they learned.

        Modalities whose stem is in `fitted_stems` are left as they are.
        """
        learning = {n: m for n, m in self.modalities.items() if m.reads_text and m.stem not in fitted_stems}

        def fit() -> dict[str, dict[str, str]]:
            for name, modality in learning.items():
                modality.fit(self._corpus(name))
            return {name: modality.state() for name, modality in learning.items()}

        states = run_on_rank_zero(fit)
        for name, modality in learning.items() if self.rank else ():
            modality.load_state(states[name])

    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each source, by name. That of a table covers the media files that tasks read from it."""
        found = {}
        for source in self.sources.values():
            if isinstance(source, Stream):
                found[source.name] = source.fingerprint
            elif source.name not in found:
                columns = {column for _, column in self._media_views(source.name)}
                found[source.name] = source.fingerprint_with_files(sorted(columns))
        return found

    def load_cursors(self, cursors: dict[str, Any], changed: Collection[str] = ()) -> dict[str, Any]:
        """Moves the streams to the cursors of a checkpoint, {task: cursor}, and returns the cursors that are used.

        If a source is in `changed`, its stream starts the next epoch, because the old position means nothing in new
        data.
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
        task, source = self.recipe.tasks[visit.task], self.sources[visit.task]
        view, size = task.views[visit.view], visit.batch_size // self.world_size
        key = seed_key(self.recipe.seed, visit.task, "augment")
        streamed = []
        if isinstance(source, Stream):
            streamed = source.read(seed_key(self.recipe.seed, visit.task), visit.start, visit.batch_size)
        unreadable: list[tuple[str, str]] = []
        # If no example of this rank's part can be read, the next rank's part is used, and so on.
        for shift in range(self.world_size):
            first = (self.rank + shift) % self.world_size * size
            rows = positions = np.arange(visit.start + first, visit.start + first + size)
            if isinstance(source, Stream):
                examples = streamed[first : first + size]
            else:
                rows = rows_at(self.recipe.seed, visit.task, len(source), positions)
                examples = source.rows(rows.tolist(), sorted(self._columns(task)))
            rngs: list[np.random.Generator] = [example_rng(key, int(position), view.sync) for position in positions]
            bad = _unreadable_targets(task, examples)
            arrays = {name: self._read(visit, name, rows.tolist(), examples, rngs, bad) for name in task.inputs}
            if shift == 0:  # Each rank reports the bad examples of its own part only.
                unreadable = [(source.row_name(int(rows[i])), reason) for i, reason in sorted(bad.items())]
            if len(bad) < size:
                break
        else:
            place, reason = unreadable[0]
            raise UserError(f"tasks.{visit.task}: no example of step {step} could be read; first: {place}: {reason}")
        chosen = _replace_bad(size, bad)
        tokens = {}
        for name, spec in task.inputs.items():
            items = np.stack([array for i in chosen for array in arrays[name][i]])
            repeated = [rng for rng in rngs for _ in range(spec.draw)]
            tokens[name] = self.modalities[name].tokens(items, view[name], repeated)
        batch = Batch(tokens, {"": torch.from_numpy(rows[chosen])}, rows=rows[chosen].tolist())
        for objective in task.objectives:
            if isinstance(objective, Classification):
                values = [examples[i][objective.label] for i in chosen]
                index = self._index[head_key(task.source, objective.label)]
                batch.labels[objective.label] = labels_of(values, index, objective, f"{task.source}.{objective.label}")
            elif objective.same:
                ids = [item_id(examples[i][objective.same], int(rows[i])) for i in chosen]
                batch.item_ids[objective.same] = torch.tensor(ids)
        digest = batch_digest(f"{visit.task} {source.row_name(row)}" for row in batch.rows)
        cursor = source.cursor() if isinstance(source, Stream) else None
        return LoadedBatch(visit, batch, unreadable, cursor, digest)

    def _columns(self, task: Task) -> set[str]:
        """The columns that a task reads from its source. Cached columns are read from `stores` instead."""
        columns = target_columns(task)
        for name, spec in task.inputs.items():
            if self.modalities[name].reads_text:
                columns.update(columns_of(spec.columns))
            else:
                columns.update(c for c in spec.columns if (task.source, name, c) not in self.stores)
        return columns

    def _media_views(self, source: str) -> dict[tuple[str, str], list[Any]]:
        """The views that read each media column of a source, by (modality, column)."""
        found: dict[tuple[str, str], list[Any]] = {}
        for task in (self.recipe.tasks[name] for name in self.sources):
            for name, spec in task.inputs.items() if task.source == source else ():
                for column in spec.columns if not self.modalities[name].reads_text else ():
                    found.setdefault((name, column), []).extend(view[name] for view in task.views)
        return found

    def _read(
        self,
        visit: Visit,
        name: str,
        rows: list[int],
        examples: list[dict[str, Any]],
        rngs: list[np.random.Generator],
        bad: dict[int, str],
    ) -> list[list[np.ndarray]]:
        """Decodes and augments modality `name` of each example, and returns `draw` arrays per example.

        Examples in `bad` are skipped. Examples that cannot be read are added to `bad`.

        One modality is decoded for all examples before the next, so that its code and constants stay in the CPU cache.
        Each example has its own random generator, so the draws do not depend on the other examples.
        """
        task, source, modality = self.recipe.tasks[visit.task], self.sources[visit.task], self.modalities[name]
        spec, view = task.inputs[name], task.views[visit.view][name]

        def decode(row: int, example: dict[str, Any], rng: np.random.Generator) -> np.ndarray:
            if modality.reads_text:
                return modality.decode(fill(spec.columns, example, rng), [view])
            column = spec.columns[int(rng.integers(len(spec.columns)))] if len(spec.columns) > 1 else spec.columns[0]
            store = self.stores.get((source.name, name, column))
            if store is not None:
                return store[row]
            return modality.decode(source.media(example[column]), [view], rng)

        arrays: list[list[np.ndarray]] = [[] for _ in rows]
        for i, (row, example, rng) in enumerate(zip(rows, examples, rngs)):
            try:
                for _ in range(spec.draw if i not in bad else 0):
                    arrays[i].append(modality.transform(decode(row, example, rng), view, rng))
            except BadMedia as error:
                bad[i] = str(error)
        return arrays

    def _corpus(self, name: str) -> Iterator[list[str]]:
        """The texts that a modality learns from, one list per row."""
        for task_name, source in self.sources.items():
            if spec := self.recipe.tasks[task_name].inputs.get(name):
                columns = columns_of(spec.columns)
                if isinstance(source, Stream):
                    rows = _first_rows(source, seed_key(self.recipe.seed, task_name), columns)
                else:
                    rows = _sample(source, seed_key(self.recipe.seed, task_name, "corpus"), columns)
                yield from all_texts(spec.columns, rows)


def _unreadable_targets(task: Task, examples: Iterable[dict[str, Any]]) -> dict[int, str]:
    """The examples with an unreadable value in a column of the objectives: {index in the batch: reason}."""
    columns = target_columns(task)
    cells = ((i, example[column]) for i, example in enumerate(examples) for column in columns)
    return {i: cell.reason for i, cell in cells if isinstance(cell, Unreadable)}


def _replace_bad(size: int, bad: Collection[int]) -> list[int]:
    """The index of the example at each place of the batch: its own or, if that is bad, the next readable one."""
    good = [i for i in range(size) if i not in bad]
    return [good[int(np.searchsorted(good, i)) % len(good)] if i in bad else i for i in range(size)]


def _first_rows(source: Stream, key: int, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The first `CORPUS_ROWS` rows of a stream. A shorter stream is read for about one epoch."""
    start = source.cursor()
    for position in range(0, CORPUS_ROWS, 256):
        yield from source.read(key, position, min(256, CORPUS_ROWS - position), columns)
        if source.cursor()["epoch"]:
            break
    # Later reads open the files anew. Forked workers would share the position in the files that are open now.
    source.load_cursor(start)


def _sample(table: Table, key: int, columns: list[str]) -> Iterator[dict[str, Any]]:
    """All rows of a table, or a random sample of `CORPUS_ROWS` rows in the table's order."""
    chosen = np.arange(min(len(table), CORPUS_ROWS))
    if len(table) > CORPUS_ROWS:
        chosen = np.sort(permute(chosen, len(table), key))
    for start in range(0, len(chosen), 4096):
        yield from table.rows(chosen[start : start + 4096].tolist(), columns)
