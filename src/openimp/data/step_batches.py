"""`StepBatches`: the data set that holds one batch for each step of a recipe.

The alternation and the order of examples are pure functions of the recipe. So a worker needs only the number of a step
to make its part of the batch, and communicates with no other worker or rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from math import lcm
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from openimp.alternation import Alternation, Visit
from openimp.common.errors import UserError, counted
from openimp.common.modality import BadMedia, Modality
from openimp.common.objective import TargetSizes, Tensors
from openimp.common.protocols import Learned
from openimp.data.batch import Batch, head_key
from openimp.data.order import batch_digest, example_rng, permute, rows_at, seed_key
from openimp.data.sources import open_source
from openimp.data.store import DecodedStore, Progress
from openimp.data.streams import Cursor, Stream
from openimp.data.tables import Table, Unreadable
from openimp.data.targets import classes_of, target_sizes
from openimp.data.templates import all_texts, columns_of, fill
from openimp.parallel.distributed import ranks_on_node, run_on_rank_zero
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Task

CORPUS_ROWS = 100_000
"""Maximum number of rows per task to train a tokenizer: whole shards of a stream, or a random sample of a table."""


@dataclass
class LoadedBatch:
    """This rank's examples of a step, or a worker's part of them, and what the training loop must know about them.

    Attributes:
        visit: the step, with its task and view.
        parts: the examples, in order, as the workers made them. A worker without a part makes none.
        names: the name of each example's row.
        bad: (row name, reason) of each example that could not be read. Another example replaces it in the batch.
        cursors: where the lanes of the task's stream resume that were read, by lane; empty for tables.
        digest: a hash of the examples, whatever their order; see `batch_digest`.
        stop: this rank's reason to stop the run before this step: an error, or "" for a signal. None: no reason.
    """

    visit: Visit
    parts: list[Batch] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    cursors: dict[str, Cursor] = field(default_factory=dict)
    digest: int = 0
    stop: str | None = None

    def without_tensors(self) -> LoadedBatch:
        """Everything but the tensors, which take much memory."""
        return replace(self, parts=[])

    @classmethod
    def merged(cls, loaded: Sequence[LoadedBatch]) -> LoadedBatch:
        """The parts of all workers together."""
        return cls(
            loaded[0].visit,
            [batch for part in loaded for batch in part.parts],
            [name for part in loaded for name in part.names],
            [bad for part in loaded for bad in part.bad],
            {lane: cursor for part in loaded for lane, cursor in part.cursors.items()},
            sum(part.digest for part in loaded),
        )

    @cached_property
    def batch(self) -> Batch:
        """All examples, in CPU memory."""
        return Batch.cat(self.parts)

    def to(self, device: torch.device) -> Batch:
        """All examples on a device. They are put together there, because only the parts are in pinned memory."""
        return Batch.cat([part.to(device) for part in self.parts])

    def pin_memory(self) -> LoadedBatch:
        """The DataLoader calls this if there is CUDA: only copies from pinned memory are asynchronous."""
        return replace(self, parts=[part.pin_memory() for part in self.parts])


@dataclass
class Example:
    """A row, decoded and augmented as a step needs it."""

    row: int  # in the table, or the position in the stream
    name: str  # by which a person can find the row
    values: dict[str, Any]  # of its columns
    rng: np.random.Generator
    arrays: dict[str, list[np.ndarray]] = field(default_factory=dict)  # `draw` arrays by modality
    targets: list[Tensors] = field(default_factory=list)  # of each objective of the task
    bad: str = ""  # the reason why it cannot be read


class StepBatches(Dataset[LoadedBatch]):
    """`dataset[step]` makes this rank's part of the batch of a step, and `part` a worker's part of that.

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
            UserError: a source or a column is missing, a label fits no class, or the ranks or the lanes of a stream do
                not divide a batch.
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
            source = tables.get(task.source) or open_source(
                task.source, recipe.sources[task.source], seed_key(recipe.seed, name)
            )
            source.require(sorted(self._columns(task)), f"tasks.{name}")
            if isinstance(source, Table):  # Tasks do not share a stream, because each has its own position in it.
                tables[task.source] = source
            else:
                _require_whole_lanes(name, task, source, world_size)
            self.sources[name] = source
        for name, source in self.sources.items():
            for objective in recipe.tasks[name].objectives:
                if labels := objective.class_column():
                    self.classes[head_key(source.name, labels.name)] = classes_of(source, labels, f"tasks.{name}")
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
        readers = {name: m for name, m in self.modalities.items() if m.reads_text and m.stem not in fitted_stems}
        learning = {name: m for name, m in readers.items() if isinstance(m, Learned)}

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

    def load_cursors(
        self, cursors: dict[str, dict[str, Cursor]], changed: Collection[str] = ()
    ) -> dict[str, dict[str, Cursor]]:
        """Moves the streams to the cursors of a checkpoint, {task: {lane: cursor}}, and returns those that are used.

        If a source is in `changed`, its streams start the next epoch.
        """
        loaded = {}
        for name, by_lane in cursors.items():
            source = self.sources[name]
            assert isinstance(source, Stream)
            loaded[name] = source.load_cursors(by_lane, source.name in changed)
        return loaded

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, step: int) -> LoadedBatch:
        return self.part(step, 0, 1)

    def part(self, step: int, number: int, parts: int) -> LoadedBatch:
        """Part `number` of this rank's examples of a step, which are divided into `parts` of about equal size.

        Part `number` reads the same lanes of a stream in every step.
        """
        visit = self.schedule[step]
        task, source = self.recipe.tasks[visit.task], self.sources[visit.task]
        positions = self._positions(visit, number, parts)
        if not positions:
            return LoadedBatch(visit)
        loaded = self._load(visit, positions)
        chosen = [self._readable(visit, position, loaded) for position in positions]
        tokens = {}
        for name, spec in task.inputs.items():
            items = np.stack([array for example in chosen for array in example.arrays[name]])
            rngs = [loaded[position].rng for position in positions for _ in range(spec.draw)]
            tokens[name] = self.modalities[name].tokens(items, task.views[visit.view][name], rngs)
        targets = [
            {key: torch.stack([target[key] for target in by_example]) for key in by_example[0]}
            for by_example in zip(*(example.targets for example in chosen))
        ]
        batch = Batch(tokens, targets, rows=[example.row for example in chosen])
        names = [example.name for example in chosen]
        bad = [(example.name, example.bad) for position in positions if (example := loaded[position]).bad]
        cursors = source.cursors() if isinstance(source, Stream) else {}
        return LoadedBatch(visit, [batch], names, bad, cursors, batch_digest(f"{visit.task} {name}" for name in names))

    def _positions(self, visit: Visit, number: int, parts: int) -> list[int]:
        """The positions, in the task's order, of the examples of a part, which has whole lanes.

        In a batch of B, slot j is of lane j * lanes // B. A table can be divided anywhere, as if each slot was a lane.
        If the ranks do not divide the lanes, a lane belongs to two ranks, each of which takes some of its slots.
        """
        lanes = self._lanes(visit.task) or visit.batch_size
        slots = visit.batch_size // lanes  # of a lane
        first, last = (visit.batch_size // self.world_size * rank for rank in (self.rank, self.rank + 1))
        first_lane, last_lane = first // slots, -(-last // slots)
        begin, end = (first_lane + (last_lane - first_lane) * part // parts for part in (number, number + 1))
        found = range(max(first, begin * slots), min(last, end * slots))
        return [visit.start + slot % slots * lanes + slot // slots for slot in found]

    def _lanes(self, task: str) -> int:
        """The number of lanes of a task's stream; 0 for a table."""
        source = self.sources[task]
        return source.lanes if isinstance(source, Stream) else 0

    def _load(self, visit: Visit, positions: Sequence[int]) -> dict[int, Example]:
        """Reads the examples at positions in the task's order."""
        task, source = self.recipe.tasks[visit.task], self.sources[visit.task]
        columns = sorted(self._columns(task))
        if isinstance(source, Stream):
            rows, named = [*positions], source.read(visit.start, positions, columns)
        else:
            rows = rows_at(self.recipe.seed, visit.task, len(source), np.array(positions, np.int64)).tolist()
            named = [*zip(map(source.row_name, rows), source.rows(rows, columns))]
        key, sync = seed_key(self.recipe.seed, visit.task, "augment"), task.views[visit.view].sync
        loaded = {
            position: Example(row, name, values, example_rng(key, position, sync))
            for position, row, (name, values) in zip(positions, rows, named)
        }
        for name in task.inputs:
            self._decode(visit, name, loaded.values())
        for example in loaded.values():
            self._read_targets(task, example)
        return loaded

    def _readable(self, visit: Visit, position: int, loaded: dict[int, Example]) -> Example:
        """The example at a position or, if that is bad, the next one of its lane (or of the table) that can be read.

        So the replacement depends neither on the ranks nor on the workers. `loaded` gets the examples that are read.
        """
        step = self._lanes(visit.task) or 1
        for candidate in range(position, position + visit.batch_size * step, step):
            if candidate not in loaded:
                loaded |= self._load(visit, [candidate])
            if not loaded[candidate].bad:
                return loaded[candidate]
        first = loaded[position]
        raise UserError(
            f"tasks.{visit.task}: {counted(visit.batch_size, 'example')} in a row could not be read in step "
            f"{visit.step}; first: {first.name}: {first.bad}"
        )

    def _columns(self, task: Task) -> set[str]:
        """The columns that a task reads from its source. Cached columns are read from `stores` instead."""
        columns = _target_columns(task)
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

    def _decode(self, visit: Visit, name: str, examples: Iterable[Example]) -> None:
        """Decodes and augments modality `name` of each example that is not bad, and marks those that cannot be read.

        One modality is decoded for all examples before the next, so that its code and constants stay in the CPU cache.
        Each example has its own random generator, so the draws do not depend on the other examples.
        """
        task, source, modality = self.recipe.tasks[visit.task], self.sources[visit.task], self.modalities[name]
        spec, view = task.inputs[name], task.views[visit.view][name]

        def decode(example: Example) -> np.ndarray:
            rng = example.rng
            if modality.reads_text:
                return modality.decode(fill(spec.columns, example.values, rng), [view])
            column = spec.columns[int(rng.integers(len(spec.columns)))] if len(spec.columns) > 1 else spec.columns[0]
            store = self.stores.get((source.name, name, column))
            if store is not None:
                return store[example.row]
            return modality.decode(source.media(example.values[column]), [view], rng)

        for example in examples:
            try:
                for _ in range(0 if example.bad else spec.draw):
                    array = modality.transform(decode(example), view, example.rng)
                    example.arrays.setdefault(name, []).append(array)
            except BadMedia as error:
                example.bad = str(error)

    def _read_targets(self, task: Task, example: Example) -> None:
        """Reads what the objectives need of an example that is not bad, and marks it if that cannot be read."""
        if example.bad:
            return
        try:
            for column in sorted(_target_columns(task)):
                if isinstance(cell := example.values[column], Unreadable):
                    raise BadMedia(cell.reason)
            example.targets = [
                objective.read(task, example.values, example.row, self._target_sizes) for objective in task.objectives
            ]
        except BadMedia as error:
            example.bad = str(error)

    @cached_property
    def _target_sizes(self) -> TargetSizes:
        return target_sizes(self.recipe, self.modalities, self.classes)

    def _corpus(self, name: str) -> Iterator[list[str]]:
        """The texts that a modality learns from, one list per row."""
        for task_name, source in self.sources.items():
            if spec := self.recipe.tasks[task_name].inputs.get(name):
                columns = columns_of(spec.columns)
                if isinstance(source, Stream):
                    epoch = ({column: row.get(column) for column in columns} for _, row in source.epoch())
                    rows: Iterator[dict[str, Any]] = islice(epoch, CORPUS_ROWS)
                else:
                    rows = _sample(source, seed_key(self.recipe.seed, task_name, "corpus"), columns)
                yield from all_texts(spec.columns, rows)


def _require_whole_lanes(name: str, task: Task, source: Stream, ranks: int) -> None:
    """Raises UserError if the lanes of a task's stream do not divide one of its batches."""
    fit = lcm(source.lanes, ranks)
    for size in (view.batch_size or task.batch_size for view in task.views):
        if size % source.lanes:
            below = size // fit * fit
            valid = [str(works) for works in (below, below + fit) if works]
            raise UserError(
                f"tasks.{name}: batch_size {size} is not a multiple of the {source.lanes} lanes of stream "
                f"{source.name}; use {' or '.join(valid)}, or set sources.{source.name}.lanes"
            )


def _target_columns(task: Task) -> set[str]:
    return {column for objective in task.objectives for column in objective.columns()}


def _sample(table: Table, key: int, columns: list[str]) -> Iterator[dict[str, Any]]:
    """All rows of a table, or a random sample of `CORPUS_ROWS` rows in the table's order."""
    chosen = np.arange(min(len(table), CORPUS_ROWS))
    if len(table) > CORPUS_ROWS:
        chosen = np.sort(permute(chosen, len(table), key))
    for start in range(0, len(chosen), 4096):
        yield from table.rows(chosen[start : start + 4096].tolist(), columns)
