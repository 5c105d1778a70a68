"""`TaskData`: what the tasks of a recipe read, opened and prepared before the first step."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from functools import cached_property, partial
from itertools import chain, islice
from typing import Any

import numpy as np

from openimp.common.errors import UserError
from openimp.common.modality import BadMedia, Modality
from openimp.common.objective import TargetSizes, Teacher, head_key
from openimp.common.progress import Progress, notice
from openimp.common.protocols import Learned, TextReader, Towered
from openimp.data.order import permute, seed_key
from openimp.data.readable import require_readable
from openimp.data.sources import open_source
from openimp.data.store import DecodedStore, EmbeddedTexts, store_column
from openimp.data.streams import Cursor, Stream
from openimp.data.tables import Table
from openimp.data.targets import classes_of, target_columns, target_sizes
from openimp.data.templates import all_texts, columns_of, fill
from openimp.parallel.distributed import rank, ranks_on_node, run_on_rank_zero
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Task

VOCABULARY_CHECK_ROWS = 10_000
"""Maximum number of rows that are searched for texts without a word that the model in `train.init` knows."""
UNKNOWN_SHARE = 0.1
"""Share of texts without a known word above which they are reported."""
CORPUS_ROWS = 100_000
"""Maximum number of rows per task to train a tokenizer: the first rows of a stream, or a random sample of a table."""


class TaskData:
    """The sources of a recipe's tasks, their classes, the decoded media, and the vectors of towers and teachers.

    Attributes:
        source_of_task: the opened source of each task with a weight above 0.
        classes: the classes of each classification head in the order of its outputs, by `head_key`.
        stores: the decoded media of each cached column, by (source, modality, column), and the vectors of each column
            that a tower (the frozen encoder of a modality) reads.
        text_vectors: the vectors of all texts that a tower reads, by modality.
        teacher_vectors: by task and teacher, the vectors of a task's rows or, of a teacher for texts, of their texts.

    `prepare` adds the decoded media and the vectors.
    """

    def __init__(
        self,
        recipe: Recipe,
        modalities: dict[str, Modality],
        world_size: int = 1,
    ) -> None:
        """Opens the sources, and looks up the classes.

        Args:
            modalities: by name; those that learn from texts need `fit` or `load_state` before the first batch.
            world_size: the number of ranks that share each batch.

        Raises:
            UserError: a source or a column is missing, a label fits no class, a tower or a teacher reads a stream, or
                the ranks or the lanes of a stream do not divide a batch.
        """
        self.recipe = recipe
        self.modalities = modalities
        self.stores: dict[tuple[str, str, str], DecodedStore] = {}
        self.text_vectors: dict[str, EmbeddedTexts] = {}
        self.teacher_vectors: dict[str, dict[Teacher, DecodedStore | EmbeddedTexts]] = {}
        self.source_of_task: dict[str, Table | Stream] = {}
        self.classes: dict[str, list[Any]] = {}
        self.world_size = world_size
        self._tables: dict[str, Table] = {}  # by the name of the source
        tasks = {name: task for name, task in recipe.tasks.items() if task.weight}
        for name, task in tasks.items():  # Before any source is opened, which may take minutes.
            for batch_size in task.batch_sizes:
                if batch_size % world_size:
                    raise UserError(f"tasks.{name}: batch_size {batch_size} is not a multiple of {world_size} ranks")
        for name, task in tasks.items():
            source = self._open_source(name, task)
            self.source_of_task[name] = source
            for column in task.class_columns:
                self.classes[head_key(source.name, column.name)] = classes_of(source, column, f"tasks.{name}")

    def _open_source(self, name: str, task: Task) -> Table | Stream:
        """Opens a task's source.

        Tasks share a table, but not a stream, in which each task has its own position.
        """
        source: Table | Stream | None = self._tables.get(task.source)
        if source is None:
            order_seed = seed_key(self.recipe.seed, name)  # of a stream; a table has no order of its own
            source = open_source(task.source, self.recipe.sources[task.source], order_seed)
        try:
            columns = self.columns(task)
        except UserError as error:  # Of a template.
            raise UserError(f"tasks.{name}: {error}") from None
        source.require(sorted(columns), f"tasks.{name}")
        if isinstance(source, Table):
            self._tables[task.source] = source
        else:
            self._check_stream(name, task, source)
        return source

    def _check_stream(self, name: str, task: Task, stream: Stream) -> None:
        """Raises UserError if a frozen encoder reads a stream, or its lanes do not divide one of the task's batches."""
        if task.teachers or any(isinstance(self.modalities[modality], Towered) for modality in task.inputs):
            raise UserError(f"tasks.{name}: has a tower or a teacher, and source {stream.name} is a stream")
        for batch_size in task.batch_sizes:
            if batch_size % stream.lanes:
                raise UserError(
                    f"tasks.{name}: batch_size {batch_size} is not a multiple of the {stream.lanes} lanes of stream "
                    f"{stream.name}; change it, or set sources.{stream.name}.lanes"
                )

    def columns(self, task: Task) -> set[str]:
        """The columns that a task reads from its source, without columns that are in `stores` already."""
        columns = target_columns(task)
        for name, spec in task.inputs.items():
            if self.modalities[name].reads_text:
                columns.update(columns_of(spec.columns))
            else:
                columns.update(column for column in spec.columns if (task.source, name, column) not in self.stores)
        return columns

    def _fill_stores(self, progress: Progress | None) -> None:
        """Adds the media that are cached or that towers read to `stores`."""
        for table in self._tables.values():
            cache = self.recipe.sources[table.name].cache
            if cache == "memory" and ranks_on_node() > 1:
                cache = "disk"  # Ranks share the pages of a file.
            for (name, column), views in self._media_views(table.name).items():
                modality = self.modalities[name]
                if isinstance(modality, Towered) or cache != "none":
                    on_disk = cache == "disk"
                    store = store_column(table, modality, column, views, on_disk=on_disk, progress=progress)
                    self.stores[table.name, name, column] = store

    def _media_views(self, source: str) -> dict[tuple[str, str], list[Any]]:
        """The views that read each media column of a source, by (modality, column)."""
        media_views: dict[tuple[str, str], list[Any]] = {}
        for task_name in self.source_of_task:
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
        """Fits the modalities that learn from the training texts, as a tokenizer does. Rank 0 learns for all ranks.

        A modality with a stem in `fitted_stems` stays as it is. If it knows no word of many texts, rank 0 warns.
        """
        for name, modality in self.modalities.items():
            if modality.stem in fitted_stems and isinstance(modality, TextReader) and rank() == 0:
                self._report_unknown_texts(name, modality)
            if modality.reads_text and modality.stem not in fitted_stems and isinstance(modality, Learned):
                state = run_on_rank_zero(partial(self._fitted_state, name, modality))
                if rank() > 0:
                    modality.load_state(state)

    def _report_unknown_texts(self, name: str, reader: TextReader) -> None:
        """Warns if many texts have no word in the vocabulary of the model in `train.init`."""
        view = next(task.views[0][name] for task in self.recipe.tasks.values() if name in task.inputs)
        texts = [*chain.from_iterable(islice(self._texts(name), VOCABULARY_CHECK_ROWS))]
        unknown = [text for text in texts if not reader.knows(text, view)]
        if len(unknown) > UNKNOWN_SHARE * len(texts):
            notice(
                f"{len(unknown) / len(texts):.0%} of the training texts have no word that the model of train.init "
                f"knows, such as {unknown[0]!r:.100}; nothing is learned from them"
            )

    def _fitted_state(self, name: str, learner: Learned) -> dict[str, str]:
        learner.fit(self._texts(name))
        return learner.state()

    def _texts(self, name: str, max_rows: int = CORPUS_ROWS) -> Iterator[list[str]]:
        """The texts that training may draw for a modality, one list per row, of at most `max_rows` rows per task."""
        for task_name, source in self.source_of_task.items():
            spec = self.recipe.tasks[task_name].inputs.get(name)
            if spec is None:
                continue
            if isinstance(source, Stream):
                rows: Iterator[dict[str, Any]] = (row for _, row in islice(source.epoch(), max_rows))
            else:
                key = seed_key(self.recipe.seed, task_name, "corpus")
                rows = source.iterate(columns_of(spec.columns), _sample(len(source), max_rows, key))
            try:
                yield from all_texts(spec.columns, rows)
            except UserError as error:
                raise UserError(f"tasks.{task_name}.inputs.{name}: {error}") from None

    def prepare(self, progress: Progress | None = None, teachers: Mapping[Teacher, Any] | None = None) -> None:
        """Decodes the media of cached sources, and embeds what towers and teachers read. It must be called before the
        first batch, and may take hours.

        Args:
            progress: `progress(iterable, description)` wraps an iterable to show progress.
            teachers: the opened teachers of the tasks. Their vectors are stored in openimp's cache.

        Raises:
            UserError: no row of a source can be read; or the vectors of a teacher have another size than the model's
                embeddings.
        """
        teachers = teachers or {}
        self._check_rows()
        size = self.target_sizes.embed_dim
        for teacher, tower in teachers.items():
            teacher_size = tower.stem_spec().values  # of its only token, a vector
            if teacher_size != size:
                raise UserError(
                    f"teacher {teacher.model}: has vectors of {teacher_size} numbers, and the model of {size}; set "
                    "model.embed_dim"
                )
        self._fill_stores(progress)
        for name, modality in self.modalities.items():
            if modality.reads_text and isinstance(modality, Towered):
                self.text_vectors[name] = EmbeddedTexts(
                    modality, chain.from_iterable(self._texts(name, sys.maxsize)), progress
                )
        for task_name, source in self.source_of_task.items():
            task = self.recipe.tasks[task_name]
            self.teacher_vectors[task_name] = {
                teacher: _teacher_vectors(source, teachers[teacher], task.inputs[teacher.modality].columns, progress)
                for teacher in task.teachers
            }

    def _check_rows(self) -> None:
        """Checks that some media of each table can be read."""
        for task_name, source in self.source_of_task.items():
            task = self.recipe.tasks[task_name]
            if isinstance(source, Stream):
                continue
            for name, spec in task.inputs.items():
                require_readable(source, self.modalities[name], spec, task.views[0][name], f"tasks.{task_name}")

    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each source, by name. That of a table covers the media files that tasks read from it."""
        sources = {source.name: source for source in self.source_of_task.values()}
        fingerprints = {}
        for name, source in sources.items():
            columns = {column for _, column in self._media_views(name)}
            fingerprints[name] = source.fingerprint_with_files(sorted(columns))
        return fingerprints

    def load_cursors(
        self, cursors: dict[str, dict[str, Cursor]], changed: Collection[str] = ()
    ) -> dict[str, dict[str, Cursor]]:
        """Moves the streams to the cursors of a checkpoint, {task: {lane: cursor}}, and returns the cursors.

        If a source is in `changed`, its streams start the next epoch, at new cursors.
        """
        used_cursors = {}
        for task, cursor_by_lane in cursors.items():
            stream = self.source_of_task[task]
            assert isinstance(stream, Stream)
            used_cursors[task] = stream.load_cursors(cursor_by_lane, stream.name in changed)
        return used_cursors

    @cached_property
    def target_sizes(self) -> TargetSizes:
        """The sizes on which the shapes of the targets depend."""
        return target_sizes(self.recipe, self.classes)


def _teacher_vectors(
    source: Table | Stream, teacher: Any, columns: list[str], progress: Progress | None
) -> DecodedStore | EmbeddedTexts:
    """The vectors of what evaluation reads of each row."""
    assert isinstance(source, Table)
    if not teacher.reads_text:
        # No views: a teacher reads media in the view of its own model, not in the task's.
        return store_column(source, teacher, columns[0], views=[], progress=progress)

    def texts() -> Iterator[str]:
        for row in source.iterate(columns_of(columns)):
            with suppress(BadMedia):
                yield fill(columns, row)

    return EmbeddedTexts(teacher, texts(), progress)


def _sample(rows: int, max_rows: int, key: int) -> list[int]:
    """All row numbers of a table, or a random sample of `max_rows` of them, in ascending order."""
    return np.sort(permute(np.arange(min(rows, max_rows)), rows, key)).tolist()
