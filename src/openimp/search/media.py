"""The media that are indexed: files, and the rows of the sources that a recipe names."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from openimp.common.errors import UserError
from openimp.common.modality import BadMedia, Modalities
from openimp.data.files import is_utf8
from openimp.data.sources import open_source
from openimp.data.tables import Table
from openimp.encoding.items import raw_value, require_columns
from openimp.inference.files import File, shown_name
from openimp.recipe.inputs import Input
from openimp.recipe.schema import Recipe


@dataclass(frozen=True)
class Media:
    """A file, or the media in a row of a source."""

    path: str  # absolute; SOURCE/ROW/COLUMN for a row. Unique in an index.
    modality: str
    state: str  # changes whenever the media may have changed
    raw: Callable[[], bytes | Path | np.ndarray]  # raises BadMedia if the media cannot be read
    text: Callable[[], str | None] = lambda: None  # the text of the row
    source: str | None = None  # of a row that contains the media itself; None for a file
    row: int | None = None
    column: str | None = None


def media_of_files(found: dict[str, list[File]], given: Iterable[Path]) -> Iterator[Media]:
    """The files that `find_files` found in the files and folders `given`."""
    roots = [Path(os.path.realpath(path)) for path in given]
    for name, paths in found.items():
        for path in map(Path, paths):
            yield _file(os.path.abspath(path), name, partial(_inside, path, roots) if path.is_symlink() else None)


def media_of_recipe(recipe: Recipe, modalities: Modalities) -> Iterator[Media]:
    """The media in the sources that the tasks and evaluation sets read. Streamed sources are skipped,
    because their rows have no numbers."""
    tables: dict[str, Table] = {}
    seen = set()
    for user in (*recipe.tasks.values(), *recipe.evaluation.sets.values()):
        if recipe.sources[user.source].stream:
            continue
        texts = [(name, spec) for name, spec in user.inputs.items() if modalities[name].reads_text]
        label = getattr(user, "label", None)
        for name, spec in user.inputs.items():
            key = (user.source, spec.columns[0], name)
            if modalities[name].reads_text or key in seen:
                continue
            seen.add(key)
            if user.source not in tables:
                tables[user.source] = source_table(recipe, user.source)
            table = tables[user.source]
            require_columns(table, modalities[name], spec, f"sources.{user.source}")
            caption = partial(_text, table, label and str(label))
            if texts:
                caption = partial(_template, table, modalities, *texts[0])
            yield from _rows(table, name, spec.columns[0], caption)


def source_table(recipe: Recipe, name: str) -> Table:
    """Opens a source of a recipe that is not a stream."""
    table = open_source(name, recipe.sources[name])
    if not isinstance(table, Table):
        raise UserError(f"source {name} is a stream")
    return table


def file_state(path: str | Path) -> str:
    """The size of a file and its modification time in nanoseconds. Empty if there is no such file."""
    try:
        about = os.stat(path)
    except OSError:
        return ""
    return f"{about.st_size}-{about.st_mtime_ns}"


def _file(path: str, modality: str, check: Callable[[], None] | None = None, text: Any = lambda: None) -> Media:
    def raw() -> Path:
        if not is_utf8(path):
            raise BadMedia("its name is not UTF-8, so the table cannot hold it")
        if check:
            check()
        return Path(path)

    return Media(shown_name(path), modality, file_state(path), raw, text)


def _inside(link: Path, roots: list[Path]) -> None:
    """Refuses a link out of the folders that are indexed: whoever put it there could show the user's other files."""
    if not any(Path(os.path.realpath(link)).is_relative_to(root) for root in roots):
        raise BadMedia("is a link out of the folders that are indexed")


def _rows(table: Table, modality: str, column: str, caption: Callable[[int], str | None]) -> Iterator[Media]:
    # Only if paths are stored can a row's value be read here: bytes would be the whole data set.
    values = table.column(column) if table.paths(column) else [None] * len(table)
    for row, value in enumerate(values):
        name = f"{table.name}/{row}/{column}"
        text = partial(caption, row)
        if isinstance(value, str) or (isinstance(value, dict) and not value.get("bytes")):
            try:
                yield _file(str(table.media(value)), modality, text=text)
                continue
            except BadMedia:
                pass  # Reading the row raises the same error, which is then recorded under the row's name.
        raw = partial(row_media, table, row, column)
        yield Media(name, modality, table.fingerprint, raw, text, table.name, row, column)


def row_media(table: Table, row: int, column: str) -> bytes | Path | np.ndarray:
    """The media in a row of a source."""
    return table.media(table.rows([row], [column])[0][column])


def _template(table: Table, modalities: Modalities, name: str, spec: Input, row: int) -> str | None:
    try:
        return str(raw_value(table, modalities[name], spec, row))
    except BadMedia:
        return None


def _text(table: Table, label: str | None, row: int) -> str | None:
    if not label or label not in table.columns:
        return None
    value = table.rows([row], [label])[0][label]
    return value if isinstance(value, str) else None
