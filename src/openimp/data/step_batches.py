"""`StepBatches`: the data set that holds one batch for each step of a recipe.

The alternation and the order of examples are pure functions of the recipe. So a worker needs only the number of a step
to make its part of the batch, and communicates with no other worker or rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from math import lcm
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from openimp.alternation import Alternation, Visit
from openimp.common.errors import UserError, counted
from openimp.common.modality import BadMedia, Modality
from openimp.common.objective import TargetSizes, Teacher, Tensors
from openimp.common.progress import Progress
from openimp.common.protocols import Learned, Towered
from openimp.data.batch import Batch, head_key
from openimp.data.embedded import EmbeddedRows, EmbeddedTexts, embed_column, texts_in
from openimp.data.order import batch_digest, example_rng, permute, rows_at, seed_key
from openimp.data.sources import open_source
from openimp.data.store import DecodedStore
from openimp.data.streams import Cursor, Stream
from openimp.data.tables import Table, Unreadable
from openimp.data.targets import classes_of, target_sizes
from openimp.data.templates import all_texts, columns_of, draw_text, fill
from openimp.parallel.distributed import ranks_on_node, run_on_rank_zero
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Task
from openimp.recipe.training import tolerant_fraction

CORPUS_ROWS = 100_000
"""Maximum number of rows per task to train a tokenizer: the first rows of a stream, or a random sample of a table."""
SHOWN_BAD_ROWS = 3
"""Bad rows that an error names."""


@dataclass
class LoadedBatch:
    """This rank's examples of a step, or a worker's part of them, and what the training loop must know about them.

    Attributes:
        visit: the step, with its task and view.
        batches: the examples, in order; one batch of each worker that has any.
        rows: the row of each example in the source, or its position in the stream.
        names: the name of each example's row.
        bad: (row name, reason) of each example that could not be read. Another example replaces it in the batch.
        cursors: where each lane of the task's stream that was read resumes; empty for tables.
        digest: a hash of the examples, whatever their order; see `batch_digest`.
        stop_reason: why this rank stops the run before this step: an error, or "" for a signal or a failed save. None:
            it goes on.
    """

    visit: Visit
    batches: list[Batch] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    cursors: dict[str, Cursor] = field(default_factory=dict)
    digest: int = 0
    stop_reason: str | None = None

    def without_tensors(self) -> LoadedBatch:
        """Everything but the tensors, which take much memory."""
        return replace(self, batches=[])

    @classmethod
    def merged(cls, parts: Sequence[LoadedBatch]) -> LoadedBatch:
        """The parts of all workers together."""
        merged = cls(parts[0].visit)
        for part in parts:
            merged.batches += part.batches
            merged.rows += part.rows
            merged.names += part.names
            merged.bad += part.bad
            merged.cursors |= part.cursors
            merged.digest += part.digest
        return merged

    @cached_property
    def batch(self) -> Batch:
        """All examples, in CPU memory."""
        return Batch.cat(self.batches)

    def to(self, device: torch.device) -> Batch:
        """All examples on a device. They are concatenated there, because only `batches` are in pinned memory."""
        return Batch.cat([batch.to(device) for batch in self.batches])

    def pin_memory(self) -> LoadedBatch:
        """The DataLoader calls this if there is CUDA: only copies from pinned memory are asynchronous."""
        return replace(self, batches=[batch.pin_memory() for batch in self.batches])


@dataclass
class Example:
    """A row, decoded and augmented as a step needs it."""

    row: int  # in the table, or the position in the stream
    name: str  # by which a person can find the row
    values: dict[str, Any]  # of its columns
    rng: np.random.Generator
    arrays: dict[str, list[np.ndarray]] = field(default_factory=dict)  # `draw` arrays by modality
    texts: dict[str, list[str]] = field(default_factory=dict)  # that were drawn, by modality
    targets: list[Tensors] = field(default_factory=list)  # of each objective of the task
    bad: str = ""  # the reason why it cannot be read


class StepBatches(Dataset[LoadedBatch]):
    """`dataset[step]` makes this rank's part of the batch of a step, and `part` a worker's part of that.

    Attributes:
        sources: the opened source of each task with a weight above 0, by task.
        classes: the classes of each classification head in the order of its outputs, by `head_key`.
        stores: the decoded media of each cached column, by (source, modality, column), and the vectors of each column
            that a tower reads.
        text_vectors: the vectors of all texts that a tower reads, by modality.
        teacher_vectors: of the rows, by task and teacher. `embed` fills it.
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
            rank, world_size: each batch is divided into `world_size` equal parts. This data set makes part `rank`.

        Raises:
            UserError: a source or a column is missing, a label fits no class, or the ranks or the lanes of a stream do
                not divide a batch.
        """
        self.recipe = recipe
        self.modalities = modalities
        self.schedule = Alternation(recipe)
        self.rank = rank
        self.world_size = world_size
        self.stores: dict[tuple[str, str, str], DecodedStore] = {}
        self.text_vectors: dict[str, EmbeddedTexts] = {}
        self.teacher_vectors: dict[str, dict[Teacher, DecodedStore | EmbeddedRows]] = {}
        self.sources: dict[str, Table | Stream] = {}
        self.classes: dict[str, list[Any]] = {}
        self._open_sources()
        for task_name, source in self.sources.items():
            for objective in recipe.tasks[task_name].objectives:
                if labels := objective.class_column():
                    classes = classes_of(source, labels, f"tasks.{task_name}")
                    self.classes[head_key(source.name, labels.name)] = classes
        self._decode_cached_media(progress)

    def _open_sources(self) -> None:
        """Fills `sources`. Tasks share a table, but not a stream, in which each task has its own position."""
        tables: dict[str, Table] = {}
        tasks = {name: task for name, task in self.recipe.tasks.items() if task.weight}
        for name, task in tasks.items():
            for batch_size in _batch_sizes(task):
                if batch_size % self.world_size:
                    raise UserError(
                        f"tasks.{name}: batch_size {batch_size} is not a multiple of {self.world_size} ranks"
                    )
        for name, task in tasks.items():
            source: Table | Stream | None = tables.get(task.source)
            if source is None:
                options = self.recipe.sources[task.source]
                source = open_source(task.source, options, seed_key(self.recipe.seed, name))
            source.require(sorted(self._columns(task)), f"tasks.{name}")
            if isinstance(source, Table):
                tables[task.source] = source
            else:
                if task.teachers:
                    raise UserError(f"tasks.{name}: has a teacher, and source {source.name} is a stream")
                _require_whole_lanes(name, task, source, self.world_size)
            self.sources[name] = source

    def _tables(self) -> Iterable[Table]:
        """The sources that are tables, each once."""
        return dict.fromkeys(source for source in self.sources.values() if isinstance(source, Table))

    def _columns(self, task: Task) -> set[str]:
        """The columns that a task reads from its source. Cached columns are read from `stores` instead."""
        columns = _target_columns(task)
        for name, spec in task.inputs.items():
            if self.modalities[name].reads_text:
                columns.update(columns_of(spec.columns))
            else:
                columns.update(column for column in spec.columns if (task.source, name, column) not in self.stores)
        return columns

    def _decode_cached_media(self, progress: Progress | None) -> None:
        """Fills `stores`."""
        for table in self._tables():
            cache = self.recipe.sources[table.name].cache
            if cache == "none":
                continue
            if cache == "memory" and ranks_on_node() > 1:
                cache = "disk"  # Ranks share the pages of a file.
            for (name, column), views in self._media_views(table.name).items():
                if isinstance(self.modalities[name], Towered):
                    continue
                store = DecodedStore.build(table, self.modalities[name], column, views, cache, progress=progress)
                self._check_bad_rows(table, column, store)
                self.stores[table.name, name, column] = store

    def _check_bad_rows(self, table: Table, column: str, store: DecodedStore) -> None:
        """UserError if more rows of a cached column are bad than a run may read: it would stop later."""
        errors = store.errors()
        limit = self.recipe.train.max_bad_fraction
        if len(errors) > limit * len(table):
            examples = [f"{table.row_name(row)}: {reason}" for row, reason in islice(errors.items(), SHOWN_BAD_ROWS)]
            raise UserError(
                f"source {table.name}: {len(errors):,} of {len(table):,} rows cannot be read, more than "
                f"train.max_bad_fraction {limit:g}; for example {'; '.join(examples)}; remove these rows, or set "
                f"train.max_bad_fraction={tolerant_fraction(len(errors) / len(table)):g} to train on the others"
            )

    def _media_views(self, source: str) -> dict[tuple[str, str], list[Any]]:
        """The views that read each media column of a source, by (modality, column)."""
        media_views: dict[tuple[str, str], list[Any]] = {}
        for task_name in self.sources:
            task = self.recipe.tasks[task_name]
            if task.source != source:
                continue
            for name, spec in task.inputs.items():
                if self.modalities[name].reads_text:
                    continue
                for column in spec.columns:
                    media_views.setdefault((name, column), []).extend(view[name] for view in task.views)
        return media_views

    def fit(self, fitted_stems: Collection[str] = ()) -> None:
        """Fits the modalities that read text to the training texts, on rank 0, and gives all ranks what they learned.

        Modalities whose stem is in `fitted_stems` are left as they are.
        """
        learners = {
            name: modality
            for name, modality in self.modalities.items()
            if modality.reads_text and modality.stem not in fitted_stems and isinstance(modality, Learned)
        }

        def fit_learners() -> dict[str, dict[str, str]]:
            for name, learner in learners.items():
                learner.fit(self._corpus(name))
            return {name: learner.state() for name, learner in learners.items()}

        states = run_on_rank_zero(fit_learners)
        if self.rank > 0:
            for name, learner in learners.items():
                learner.load_state(states[name])

    def _corpus(self, name: str) -> Iterator[list[str]]:
        """The texts that a modality learns from, one list per row."""
        for task_name, source in self.sources.items():
            spec = self.recipe.tasks[task_name].inputs.get(name)
            if spec is None:
                continue
            columns = columns_of(spec.columns)
            if isinstance(source, Stream):
                epoch = ({column: row.get(column) for column in columns} for _, row in source.epoch())
                rows: Iterator[dict[str, Any]] = islice(epoch, CORPUS_ROWS)
            else:
                rows = _sample(source, seed_key(self.recipe.seed, task_name, "corpus"), columns)
            yield from all_texts(spec.columns, rows)

    def embed(self, progress: Progress | None, teachers: Mapping[Teacher, Any]) -> None:
        """Embeds what towers and teachers read. It must be called before the first batch.

        Vectors are stored in openimp's cache. UserError if a source is a stream, which is read only once, or if the
        vectors of a teacher or in a column have another size than the model's embeddings.
        """
        self._check_first_rows()
        self._embed_for_towers(progress)
        size = self._target_sizes.embed_dim
        for teacher, tower in teachers.items():
            if tower.stem_spec().values != size:
                raise UserError(
                    f"teacher {teacher.model}: has vectors of {tower.stem_spec().values} numbers, and the model of "
                    f"{size}; set model.embed_dim"
                )
        for task_name, source in self.sources.items():
            task = self.recipe.tasks[task_name]
            vectors: dict[Teacher, DecodedStore | EmbeddedRows] = {}
            for teacher in task.teachers:
                assert isinstance(source, Table)
                tower = teachers[teacher]
                columns = task.inputs[teacher.modality].columns
                if tower.reads_text:
                    vectors[teacher] = EmbeddedRows(source, tower, columns, progress)
                else:
                    vectors[teacher] = embed_column(source, tower, columns[0], views=[], progress=progress)
            self.teacher_vectors[task_name] = vectors

    def _check_first_rows(self) -> None:
        """Checks before the training what would make every row of a table a bad example."""
        for task_name, source in self.sources.items():
            task = self.recipe.tasks[task_name]
            columns = sorted(_target_columns(task))
            if isinstance(source, Stream) or not columns:
                continue
            (row,) = source.rows([0], columns)
            for i, objective in enumerate(task.objectives):
                objective.check_row(f"tasks.{task_name}.objectives.{i}", row, self._target_sizes)

    def _embed_for_towers(self, progress: Progress | None) -> None:
        for task_name, source in self.sources.items():
            for name in self.recipe.tasks[task_name].inputs:
                if isinstance(self.modalities[name], Towered) and isinstance(source, Stream):
                    raise UserError(f"tasks.{task_name}: a tower reads {name}, and source {source.name} is a stream")
        for table in self._tables():
            for (name, column), views in self._media_views(table.name).items():
                modality = self.modalities[name]
                if isinstance(modality, Towered):
                    store = embed_column(table, modality, column, views, progress)
                    self.stores[table.name, name, column] = store
        for name, modality in self.modalities.items():
            if modality.reads_text and isinstance(modality, Towered):
                self.text_vectors[name] = EmbeddedTexts(modality, self._texts(name), progress)

    def _texts(self, name: str) -> Iterator[str]:
        """All texts that training may draw for a modality with a tower."""
        for task_name, source in self.sources.items():
            spec = self.recipe.tasks[task_name].inputs.get(name)
            if spec is not None:
                assert isinstance(source, Table)
                yield from texts_in(source, spec.columns)

    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each source, by name. That of a table covers the media files that tasks read from it."""
        fingerprints = {}
        for source in self.sources.values():
            if source.name in fingerprints:
                continue
            if isinstance(source, Stream):
                fingerprints[source.name] = source.fingerprint
            else:
                columns = {column for _, column in self._media_views(source.name)}
                fingerprints[source.name] = source.fingerprint_with_files(sorted(columns))
        return fingerprints

    def load_cursors(
        self, cursors: dict[str, dict[str, Cursor]], changed: Collection[str] = ()
    ) -> dict[str, dict[str, Cursor]]:
        """Moves the streams to the cursors of a checkpoint, {task: {lane: cursor}}, and returns those that are used.

        If a source is in `changed`, its streams start the next epoch.
        """
        used_cursors = {}
        for task, cursor_by_lane in cursors.items():
            stream = self.sources[task]
            assert isinstance(stream, Stream)
            used_cursors[task] = stream.load_cursors(cursor_by_lane, stream.name in changed)
        return used_cursors

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, step: int) -> LoadedBatch:
        return self.part(step, 0, 1)

    def part(self, step: int, number: int, parts: int) -> LoadedBatch:
        """Part `number` of this rank's examples of a step, which are divided into `parts` of about equal size.

        Part `number` reads the same lanes of a stream in every step.
        """
        visit = self.schedule[step]
        task = self.recipe.tasks[visit.task]
        source = self.sources[visit.task]
        positions = self._positions(visit, number, parts)
        if not positions:
            return LoadedBatch(visit)
        loaded = self._load(visit, positions)
        examples = [self._readable(visit, position, loaded) for position in positions]
        tokens = {}
        for name, spec in task.inputs.items():
            items = np.stack([array for example in examples for array in example.arrays[name]])
            # By position, because the same example may replace two bad ones of a batch.
            rngs = [loaded[position].rng for position in positions for _ in range(spec.draw)]
            tokens[name] = self.modalities[name].tokens(items, task.views[visit.view][name], rngs)
        targets = []
        for targets_of_objective in zip(*(example.targets for example in examples)):
            keys = targets_of_objective[0]
            targets.append({key: torch.stack([target[key] for target in targets_of_objective]) for key in keys})
        names = [example.name for example in examples]
        # Bad examples that `_readable` has met further on count in the step of their own position.
        at_positions = [loaded[position] for position in positions]
        return LoadedBatch(
            visit,
            batches=[Batch(tokens, targets)],
            rows=[example.row for example in examples],
            names=names,
            bad=[(example.name, example.bad) for example in at_positions if example.bad],
            cursors=source.cursors() if isinstance(source, Stream) else {},
            digest=batch_digest(f"{visit.task} {name}" for name in names),
        )

    def _positions(self, visit: Visit, number: int, parts: int) -> list[int]:
        """The positions, in the task's order, of the examples of a part, which has whole lanes.

        A batch lists the examples of its first lane, then those of the second, and so on. The task's order takes one
        example of each lane in turn: position p is in lane p % lanes. In a table, each example is a lane of its own. If
        the lanes are not a multiple of the ranks, two ranks share a lane, and each takes a part of its examples.
        """
        lanes = self.sources[visit.task].lanes or visit.batch_size
        lane_size = visit.batch_size // lanes  # examples of a lane in the batch
        rank_size = visit.batch_size // self.world_size
        rank_start = rank_size * self.rank
        rank_stop = rank_start + rank_size
        first_lane = rank_start // lane_size
        rank_lanes = -(-rank_stop // lane_size) - first_lane
        part_start = (first_lane + rank_lanes * number // parts) * lane_size
        part_stop = (first_lane + rank_lanes * (number + 1) // parts) * lane_size
        positions = []
        for example in range(max(rank_start, part_start), min(rank_stop, part_stop)):
            lane, place = divmod(example, lane_size)
            positions.append(visit.start + place * lanes + lane)
        return positions

    def _load(self, visit: Visit, positions: Sequence[int]) -> dict[int, Example]:
        """Reads the examples at positions in the task's order."""
        task = self.recipe.tasks[visit.task]
        source = self.sources[visit.task]
        columns = sorted(self._columns(task))
        if isinstance(source, Stream):
            rows = list(positions)
            named_rows = source.read(visit.start, positions, columns)
        else:
            rows = rows_at(self.recipe.seed, visit.task, len(source), np.array(positions, np.int64)).tolist()
            named_rows = list(zip(map(source.row_name, rows), source.rows(rows, columns)))
        key = seed_key(self.recipe.seed, visit.task, "augment")
        sync = task.views[visit.view].sync
        loaded = {}
        for position, row, (row_name, values) in zip(positions, rows, named_rows):
            loaded[position] = Example(row, row_name, values, example_rng(key, position, sync))
        for example in loaded.values():
            # First, because media of an example with a bad target are not decoded.
            self._read_targets(visit.task, example)
        for modality_name in task.inputs:
            self._decode(visit, modality_name, loaded.values())
        for example in loaded.values():
            for objective, targets in zip(task.objectives, example.targets):
                targets.update(objective.read_texts(example.texts))
        return loaded

    def _readable(self, visit: Visit, position: int, loaded: dict[int, Example]) -> Example:
        """The example at a position or, if that is bad, the next one of its lane (or of the table) that can be read.

        So the replacement depends neither on the ranks nor on the workers. Adds the examples that it reads to `loaded`.
        """
        stride = self.sources[visit.task].lanes or 1
        for candidate in range(position, position + visit.batch_size * stride, stride):
            if candidate not in loaded:
                loaded |= self._load(visit, [candidate])
            if not loaded[candidate].bad:
                return loaded[candidate]
        bad_example = loaded[position]
        raise UserError(
            f"tasks.{visit.task}: {counted(visit.batch_size, 'example')} in a row could not be read in step "
            f"{visit.step}; first: {bad_example.name}: {bad_example.bad}"
        )

    def _decode(self, visit: Visit, modality_name: str, examples: Iterable[Example]) -> None:
        """Decodes and augments one modality of each example that is not bad, and marks those that cannot be read.

        One modality is decoded for all examples before the next, so that its code and constants stay in the CPU cache.
        Each example has its own random generator, so the draws do not depend on the other examples.
        """
        task = self.recipe.tasks[visit.task]
        source = self.sources[visit.task]
        modality = self.modalities[modality_name]
        spec = task.inputs[modality_name]
        view = task.views[visit.view][modality_name]

        def decode(example: Example) -> np.ndarray:
            rng = example.rng
            if modality.reads_text:
                vectors = self.text_vectors.get(modality_name)
                # `fill` may write a text that no tower has embedded.
                write = fill if vectors is None else draw_text
                text = write(spec.columns, example.values, rng)
                example.texts.setdefault(modality_name, []).append(text)
                return modality.decode(text, [view]) if vectors is None else vectors[text]
            column = spec.columns[0]
            if len(spec.columns) > 1:
                column = spec.columns[int(rng.integers(len(spec.columns)))]
            store = self.stores.get((source.name, modality_name, column))
            if store is not None:
                return store[example.row]
            return modality.decode(source.media(example.values[column]), [view], rng)

        for example in examples:
            if example.bad:
                continue
            try:
                for _ in range(spec.draw):
                    array = modality.transform(decode(example), view, example.rng)
                    example.arrays.setdefault(modality_name, []).append(array)
            except BadMedia as error:
                example.bad = str(error)

    def _read_targets(self, task_name: str, example: Example) -> None:
        """Reads what the objectives need of an example that is not bad, and marks it if that cannot be read."""
        if example.bad:
            return
        task = self.recipe.tasks[task_name]
        try:
            for teacher, vectors in self.teacher_vectors.get(task_name, {}).items():
                example.values[teacher.column] = vectors[example.row][0]  # A teacher has one vector per item.
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


def _batch_sizes(task: Task) -> list[int]:
    """The batch size of each view of a task."""
    return [view.batch_size or task.batch_size for view in task.views]


def _require_whole_lanes(name: str, task: Task, stream: Stream, ranks: int) -> None:
    """Raises UserError if the lanes of a task's stream do not divide one of its batches."""
    unit = lcm(stream.lanes, ranks)
    for batch_size in _batch_sizes(task):
        if batch_size % stream.lanes:
            below = batch_size // unit * unit
            valid_sizes = [str(size) for size in (below, below + unit) if size]
            raise UserError(
                f"tasks.{name}: batch_size {batch_size} is not a multiple of the {stream.lanes} lanes of stream "
                f"{stream.name}; use {' or '.join(valid_sizes)}, or set sources.{stream.name}.lanes"
            )


def _target_columns(task: Task) -> set[str]:
    return {column for objective in task.objectives for column in objective.columns()}


def _sample(table: Table, key: int, columns: list[str]) -> Iterator[dict[str, Any]]:
    """All rows of a table, or a random sample of `CORPUS_ROWS` rows in the table's order."""
    rows = np.arange(min(len(table), CORPUS_ROWS))
    if len(table) > CORPUS_ROWS:
        rows = np.sort(permute(rows, len(table), key))
    return chain.from_iterable(table.chunks(rows.tolist(), columns))
