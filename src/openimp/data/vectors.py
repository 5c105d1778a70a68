"""Batches of towers' vectors, cut out of arrays.

If each input of a task has a tower, an example is a few vectors that were computed before the training. Reading them
example by example would take longer than a step. So what the rows are read as is kept in arrays, by row.

Shape suffixes: B examples, N rows or items, C crops, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from torch.utils._pytree import tree_map

from openimp.alternation import Visit
from openimp.common.errors import UserError, counted
from openimp.common.modality import BadMedia, Modality
from openimp.common.objective import TargetSizes, Tensors
from openimp.common.protocols import Towered
from openimp.data.batch import Batch
from openimp.data.examples import MIN_TRIES
from openimp.data.loaded_batch import LoadedBatch
from openimp.data.order import batch_digest, random_bytes, rows_at, seed_key, uniform
from openimp.data.store import ALIGN, DecodedStore, EmbeddedTexts
from openimp.data.tables import Table, Unreadable
from openimp.data.targets import target_columns
from openimp.data.task_data import TaskData
from openimp.data.templates import all_texts, columns_of, fill
from openimp.recipe.tasks import Task


def vector_tasks(data: TaskData) -> dict[str, VectorTask]:
    """The tasks whose inputs all have towers, by name. `data` must be prepared."""
    return {
        name: VectorTask(name, source, data)
        for name, source in data.source_of_task.items()
        if isinstance(source, Table) and has_only_vectors(data.recipe.tasks[name], data.modalities)
    }


def has_only_vectors(task: Task, modalities: Mapping[str, Modality]) -> bool:
    """Whether all inputs of a task have towers. Not if it has teachers, several columns of media, or `draw`."""
    if task.teachers:
        return False
    for name, spec in task.inputs.items():
        has_one_column = modalities[name].reads_text or len(spec.columns) == 1
        if not (isinstance(modalities[name], Towered) and has_one_column and spec.draw == 1):
            return False
    return True


class VectorTask:
    """A task whose examples are vectors. `read` makes the examples of a step."""

    def __init__(self, name: str, table: Table, data: TaskData) -> None:
        """Reads all rows of a task's table."""
        self._name = name
        self._task = data.recipe.tasks[name]
        self._table = table
        self._modalities = data.modalities
        self._seed = data.recipe.seed
        self._inputs: dict[str, MediaVectors | TextVectors] = {}
        for modality, spec in self._task.inputs.items():
            if modality in data.text_vectors:
                rows = table.iterate(columns_of(spec.columns))
                self._inputs[modality] = TextVectors(data.text_vectors[modality], spec.columns, rows)
            else:
                self._inputs[modality] = MediaVectors(data.stores[table.name, modality, spec.columns[0]])
        self._problems: dict[int, str] = {}  # why a row cannot be read
        for vectors in self._inputs.values():
            self._problems = {**vectors.problems, **self._problems}
        targets_of_rows = [*self._read_targets(data.target_sizes)]
        readable = [targets for targets in targets_of_rows if targets is not None]
        # Of each objective, by name: a tensor with an entry per readable row.
        self._targets: list[Tensors] = tree_map(lambda *tensors: torch.stack(tensors), *readable) if readable else []
        # For each row, the number of its entry.
        self._target_of_row = np.cumsum([targets is not None for targets in targets_of_rows]) - 1

    def _read_targets(self, sizes: TargetSizes) -> Iterator[list[Tensors] | None]:
        """For each row, the targets of each objective; None if the row cannot be read."""
        columns = sorted(target_columns(self._task))
        for number, row in enumerate(self._table.iterate(columns)):
            if number in self._problems:
                yield None
                continue
            try:
                for column in columns:
                    if isinstance(cell := row[column], Unreadable):
                        raise BadMedia(cell.reason)
                yield [objective.read(self._task, row, number, sizes) for objective in self._task.objectives]
            except BadMedia as error:
                self._problems[number] = str(error)
                yield None

    def read(self, visit: Visit, positions: Sequence[int]) -> LoadedBatch:
        """The examples at positions in the task's order. As with other tasks, the next row replaces a bad one."""
        first_rows = self._rows_at(positions)
        bad = [row for row in first_rows.tolist() if row in self._problems]
        used_positions = [self._readable_position(visit, position) for position in positions] if bad else positions
        rows = self._rows_at(used_positions)
        key = seed_key(self._seed, self._name, "augment")
        draws = uniform(key, used_positions, len(self._inputs))
        tokens = {}
        texts = {}
        for draw, (name, vectors) in zip(draws, self._inputs.items()):
            vectors_BD, texts[name] = vectors.draw(rows, draw)
            view = self._task.views[visit.view][name]
            noise = None
            if view.dropout:
                noise = random_bytes(seed_key(key, name), used_positions, vectors_BD.shape[1])
            tokens[name] = cast(Towered, self._modalities[name]).training_tokens(vectors_BD, view, noise)
        targets = tree_map(lambda tensor: tensor[self._target_of_row[rows]], self._targets)
        self._add_text_targets(targets, {modality: drawn for modality, drawn in texts.items() if drawn})
        names = [self._table.row_name(row) for row in rows.tolist()]
        return LoadedBatch(
            visit,
            batches=[Batch(tokens, targets)],
            rows=rows.tolist(),
            names=names,
            bad=[(self._table.row_name(row), self._problems[row]) for row in bad],
            digest=batch_digest(f"{self._name} {name}" for name in names),
        )

    def _rows_at(self, positions: Sequence[int]) -> np.ndarray:
        return rows_at(self._seed, self._name, len(self._table), np.array(positions, np.int64))

    def _readable_position(self, visit: Visit, position: int) -> int:
        """The first position from this one on whose row can be read; see `ExampleReader.find_readable`."""
        tries = max(visit.batch_size, MIN_TRIES)
        rows = self._rows_at(range(position, position + tries)).tolist()
        for number, row in enumerate(rows):
            if row not in self._problems:
                return position + number
        name, problem = self._table.row_name(rows[0]), self._problems[rows[0]]
        raise UserError(
            f"tasks.{self._name}: {counted(tries, 'example')} in a row could not be read in step {visit.step}; first: "
            f"{name}: {problem}"
        )

    def _add_text_targets(self, targets: list[Tensors], texts: Mapping[str, list[str]]) -> None:
        """Adds to the targets of each objective those that depend on the texts that were drawn, by modality."""
        for objective, of_objective in zip(self._task.objectives, targets):
            of_examples = [
                objective.read_texts({modality: [text] for modality, text in zip(texts, drawn)})
                for drawn in zip(*texts.values())
            ]
            if of_examples and of_examples[0]:
                of_objective.update(tree_map(lambda *tensors: torch.stack(tensors), *of_examples))


class ItemVectors:
    """The vectors of a store's items, read many at a time: `vectors[items]` is (B, C, D).

    They stay where the store has them: in memory that forked workers share, or in a mapped file.

    Attributes:
        problems: why an item cannot be read, by its number.
    """

    def __init__(self, store: DecodedStore) -> None:
        errors = store.items.column("error")
        is_readable = ~errors.is_valid().to_numpy()
        self.problems = {item: errors[item].as_py() for item in np.flatnonzero(~is_readable).tolist()}
        self._place = np.cumsum(is_readable) - 1  # for each item, its place among those that can be read
        self._arrays: list[np.ndarray] = []
        if is_readable.any():
            first = int(is_readable.argmax())
            shape, dtype = (store.items.column(name)[first].as_py() for name in ("shape", "dtype"))
            chunks = store.items.column("data").chunks
            self._arrays = [_as_array(chunk, tuple(shape), np.dtype(dtype)) for chunk in chunks]
        self._ends = np.cumsum([len(array) for array in self._arrays])

    def __getitem__(self, items: np.ndarray) -> np.ndarray:
        places = self._place[items]
        chunks = np.searchsorted(self._ends, places, side="right")
        vectors_BCD = np.empty((len(items), *self._arrays[0].shape[1:]), self._arrays[0].dtype)
        for chunk in np.unique(chunks).tolist():
            in_chunk = chunks == chunk
            array = self._arrays[chunk]
            vectors_BCD[in_chunk] = array[places[in_chunk] - (self._ends[chunk] - len(array))]
        return vectors_BCD


class MediaVectors:
    """The vectors of the media of a task's rows.

    Attributes:
        problems: why a row cannot be read, by its number.
    """

    def __init__(self, store: DecodedStore) -> None:
        self._vectors = ItemVectors(store)
        self._item_of_row = np.arange(len(store.items)) if store.item_of_row is None else store.item_of_row
        bad_rows = np.flatnonzero(np.isin(self._item_of_row, [*self._vectors.problems])).tolist()
        self.problems = {row: self._vectors.problems[int(self._item_of_row[row])] for row in bad_rows}

    def draw(self, rows: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """One of the crops (B, D) of each row, by random numbers from 0 to 1, and no texts."""
        vectors_BCD = self._vectors[self._item_of_row[rows]]
        crops = (draws * vectors_BCD.shape[1]).astype(np.int64)
        return vectors_BCD[np.arange(len(rows)), crops], []


class TextVectors:
    """The vectors of the texts of a task's rows.

    Attributes:
        problems: why a row cannot be read, by its number.
    """

    def __init__(self, embedded: EmbeddedTexts, templates: list[str], rows: Iterable[dict[str, Any]]) -> None:
        self._vectors = ItemVectors(embedded.store)
        self._texts = [*embedded.number]
        self.problems: dict[int, str] = {}
        numbers_of_rows: list[list[int]] = []
        for number, row in enumerate(rows):
            try:
                texts = next(all_texts(templates, [row]), None) or [fill(templates, row)]
            except BadMedia as error:
                self.problems[number] = str(error)
                texts = []
            numbers = [embedded.number[text] for text in texts]
            if problem := next((self._vectors.problems[n] for n in numbers if n in self._vectors.problems), None):
                self.problems[number] = problem
            numbers_of_rows.append(numbers)
        counts = [len(numbers) for numbers in numbers_of_rows]
        self._numbers = np.array([number for numbers in numbers_of_rows for number in numbers], np.int64)
        self._count = np.array(counts, np.int64)
        self._start = np.cumsum(self._count) - self._count

    def draw(self, rows: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """The vectors (B, D) of one of the texts of each row, by random numbers from 0 to 1, and these texts."""
        numbers = self._numbers[self._start[rows] + (draws * self._count[rows]).astype(np.int64)]
        return self._vectors[numbers][:, 0], [self._texts[number] for number in numbers.tolist()]


def _as_array(chunk: pa.Array, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The arrays in a chunk of a store, all of one shape, as one array, without a copy."""
    _, offsets, data = chunk.buffers()
    ends = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
    size = int(np.prod(shape)) * dtype.itemsize
    padded = size + -size % ALIGN
    items = np.frombuffer(data, np.uint8)[ends[0] : ends[-1]].reshape(-1, padded)
    return items[:, :size].view(dtype).reshape(-1, *shape)
