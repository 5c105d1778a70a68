"""`ExampleReader`: the examples of a step, decoded and augmented."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from openimp.alternation import Visit
from openimp.common.errors import UserError, counted
from openimp.common.modality import BadMedia
from openimp.common.objective import Tensors
from openimp.data.order import example_rng, rows_at, seed_key
from openimp.data.store import EmbeddedTexts
from openimp.data.streams import Stream
from openimp.data.tables import Unreadable
from openimp.data.targets import target_columns
from openimp.data.task_data import TaskData
from openimp.data.templates import draw_text, fill

MIN_TRIES = 10
"""Examples in a row that are tried in place of one that is bad; the examples of a batch if they are more."""


@dataclass
class Example:
    """A row, decoded and augmented as a step needs it."""

    row: int  # in the table, or the position in the stream
    name: str  # by which a person can find the row
    values: dict[str, Any]  # of its columns
    rng: np.random.Generator
    arrays: dict[str, list[np.ndarray]] = field(default_factory=dict)  # by modality, one per draw
    texts: dict[str, list[str]] = field(default_factory=dict)  # that were drawn, by modality
    targets: list[Tensors] = field(default_factory=list)  # of each objective of the task
    bad: str = ""  # the reason why it cannot be read


class ExampleReader:
    """Reads the examples of a recipe's tasks."""

    def __init__(self, data: TaskData) -> None:
        self.data = data

    def load(self, visit: Visit, positions: Sequence[int]) -> dict[int, Example]:
        """Reads the examples at positions in the task's order, bad ones too: {position: example}."""
        task = self.data.recipe.tasks[visit.task]
        source = self.data.source_of_task[visit.task]
        columns = sorted(self.data.columns(task))
        rows = positions
        if isinstance(source, Stream):
            named_rows = source.read(visit.start, positions, columns)
        else:
            rows = rows_at(self.data.recipe.seed, visit.task, len(source), np.array(positions, np.int64)).tolist()
            named_rows = list(zip(map(source.row_name, rows), source.rows(rows, columns)))
        key = seed_key(self.data.recipe.seed, visit.task, "augment")
        same_start = task.views[visit.view].sync
        loaded = {}
        for position, row, (row_name, values) in zip(positions, rows, named_rows):
            example = Example(row, row_name, values, example_rng(key, position, same_start))
            # First, because media of an example with a bad target are not decoded.
            self._read_targets(visit.task, example)
            loaded[position] = example
        for modality_name in task.inputs:
            self._decode(visit, modality_name, loaded.values())
        for example in loaded.values():
            for objective, targets in zip(task.objectives, example.targets):
                targets.update(objective.read_texts(example.texts))
        return loaded

    def find_readable(self, visit: Visit, position: int, loaded: dict[int, Example]) -> Example:
        """The example at a position or, if that is bad, the next one of its lane (or of the table) that can be read.

        So the replacement depends neither on the ranks nor on the workers. Adds the examples that it reads to `loaded`.
        """
        stride = self.data.source_of_task[visit.task].lanes or 1
        tries = max(visit.batch_size, MIN_TRIES)
        for candidate in range(position, position + tries * stride, stride):
            if candidate not in loaded:
                loaded |= self.load(visit, [candidate])
            if not loaded[candidate].bad:
                return loaded[candidate]
        bad_example = loaded[position]
        advice = ""
        if self.data.source_of_task[visit.task].path.endswith(".tar") and None in bad_example.values.values():
            advice = "; in a tar, the members of an example must be next to each other (tar --sort=name)"
        raise UserError(
            f"tasks.{visit.task}: {counted(tries, 'example')} in a row could not be read in step "
            f"{visit.step}; first: {bad_example.name}: {bad_example.bad}{advice}"
        )

    def _decode(self, visit: Visit, modality_name: str, examples: Iterable[Example]) -> None:
        """Decodes and augments one modality of each example that is not bad, and marks those that cannot be read.

        One modality is decoded for all examples before the next, so that its code and constants stay in the CPU cache.
        Each example has its own random generator, so the draws do not depend on the other examples.
        """
        task = self.data.recipe.tasks[visit.task]
        source = self.data.source_of_task[visit.task]
        modality = self.data.modalities[modality_name]
        spec = task.inputs[modality_name]
        view = task.views[visit.view][modality_name]

        def read(example: Example) -> np.ndarray:
            rng = example.rng
            if modality.reads_text:
                vectors = self.data.text_vectors.get(modality_name)
                # `fill` also writes random subsets of `{x*}`, which no tower has embedded.
                write = fill if vectors is None else draw_text
                text = write(spec.columns, example.values, rng)
                example.texts.setdefault(modality_name, []).append(text)
                return modality.decode(text, [view]) if vectors is None else vectors[text]
            column = spec.columns[0]
            if len(spec.columns) > 1:
                column = spec.columns[int(rng.integers(len(spec.columns)))]
            store = self.data.stores.get((source.name, modality_name, column))
            if store is not None:
                return store[example.row]
            return modality.decode(source.media(example.values[column]), [view], rng)

        for example in examples:
            if example.bad:
                continue
            try:
                for _ in range(spec.draw):
                    array = modality.transform(read(example), view, example.rng)
                    example.arrays.setdefault(modality_name, []).append(array)
            except BadMedia as error:
                example.bad = str(error)

    def _read_targets(self, task_name: str, example: Example) -> None:
        """Reads what the objectives need of a new example, and marks it if that cannot be read."""
        task = self.data.recipe.tasks[task_name]
        try:
            for teacher, vectors in self.data.teacher_vectors.get(task_name, {}).items():
                if isinstance(vectors, EmbeddedTexts):
                    vectors_of_item = vectors[fill(task.inputs[teacher.modality].columns, example.values)]
                else:
                    vectors_of_item = vectors[example.row]
                example.values[teacher.column] = vectors_of_item[0]  # A teacher has one vector per item.
            for column in sorted(target_columns(task)):
                if isinstance(cell := example.values[column], Unreadable):
                    raise BadMedia(cell.reason)
            example.targets = [
                objective.read(task, example.values, example.row, self.data.target_sizes)
                for objective in task.objectives
            ]
        except BadMedia as error:
            example.bad = str(error)
