"""The media that are indexed: files, and the rows of the sources that a recipe names."""

import os
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from openimp.common.cache import stable_hash
from openimp.common.errors import UserError
from openimp.common.modality import BadMedia, Modalities
from openimp.common.safe_files import file_state
from openimp.data.files import is_utf8
from openimp.data.sources import open_source
from openimp.data.tables import Table
from openimp.data.templates import all_texts, columns_of
from openimp.encoding.items import require_columns
from openimp.inference.files import File, file_text, shown_name
from openimp.recipe.inputs import Input
from openimp.recipe.schema import Recipe

Roots = Callable[[], list[Path]]
"""Returns the folders that a link may not lead out of."""
ReadText = Callable[[], str | None]
"""Returns the text that belongs to media; raises BadMedia if it cannot be read."""


@dataclass(frozen=True)
class Media:
    """A file, or the media in a row of a source."""

    path: str  # absolute; SOURCE/ROW/COLUMN for a row. Unique in an index.
    modality: str
    # Of a row: the source's `whole_fingerprint`. Of a file: "FILE_STATE", or "FILE_STATE TEXT_STATE" if it has a text.
    # TEXT_STATE is the caption's FILE_STATE, or the fingerprint of the source that names the file, or, if several
    # sources name it, a hash of the states of all.
    state: str
    raw: Callable[[], bytes | Path | np.ndarray]  # raises BadMedia if the media cannot be read
    text: ReadText = lambda: None  # its caption or the text of its row
    name_text: Callable[[], str | None] = lambda: None  # the words of its name, if it has no text that can be read
    source: str | None = None  # that names or contains the media; None for a file in a folder that was given
    row: int | None = None  # of the source, if the row contains the media itself; None for a file
    column: str | None = None
    root: Path | None = None  # the folder of the source that names the file


def media_of_files(
    files_by_modality: dict[str, list[File]], given: Sequence[Path], modalities: Modalities
) -> Iterator[Media]:
    """The files that `find_files` found in the files and folders `given`.

    A text file beside a medium, such as `a.txt` beside `a.jpg`, is its caption, and not an item. The text of a medium
    without a caption that can be read is its path in the given folder, without the extension: `dog/on the beach`.
    """
    folders = {os.path.abspath(path) for path in given}
    roots = cache(lambda: [Path(os.path.realpath(path)) for path in given])  # Slow; needed only if there are links.
    files = [(os.path.abspath(path), name) for name, paths in files_by_modality.items() for path in paths]
    texts = [(path, name) for path, name in files if modalities[name].reads_text]
    caption_of = {os.path.splitext(path)[0]: path for path, _ in texts}
    used_captions = set()
    text_endings = [ending for modality in modalities.values() if modality.reads_text for ending in modality.extensions]
    text_endings += [ending.upper() for ending in text_endings]
    for path, name in files:
        if modalities[name].reads_text:
            continue
        stem = os.path.splitext(path)[0]
        caption = caption_of.get(stem)
        if caption is None:  # The files may be named by a pattern such as photos/*.jpg.
            caption = next((stem + ending for ending in text_endings if os.path.isfile(stem + ending)), None)
        media = replace(_file(path, name, roots), name_text=partial(_path_as_text, path, folders))
        if caption is not None:
            used_captions.add(caption)
            state = f"{media.state} {file_state(caption)}"
            media = replace(media, state=state, text=partial(_caption, caption, roots))
        yield media
    for path, name in texts:
        if path not in used_captions:
            yield _file(path, name, roots)


def media_of_recipe(recipe: Recipe, modalities: Modalities) -> Iterator[Media]:
    """The media in the sources that the tasks and evaluation sets read. Streamed sources are skipped, because their
    rows have no numbers. Media of other modalities than `modalities` are skipped, too."""
    open_table = cache(partial(source_table, recipe))
    seen = set()

    def texts_of(user: Any) -> list[Input]:
        return [spec for name, spec in user.inputs.items() if name in modalities and modalities[name].reads_text]

    users = [*recipe.tasks.values(), *recipe.evaluation.sets.values()]
    for user in sorted(users, key=lambda user: not texts_of(user)):  # Texts say more than classes.
        texts = texts_of(user)
        if recipe.sources[user.source].stream:
            continue
        for name, spec in user.inputs.items():
            column = spec.columns[0]
            if name not in modalities or modalities[name].reads_text or (user.source, column, name) in seen:
                continue
            seen.add((user.source, column, name))
            table = open_table(user.source)
            require_columns(table, modalities[name], spec, f"sources.{user.source}")
            templates = [template for spec in texts[:1] for template in spec.columns]
            if (label := _class_column(user)) in table.columns:
                templates.append(label)
            yield from _rows(table, name, column, partial(_row_text, table, templates))


def source_table(recipe: Recipe, name: str) -> Table:
    """Opens a source of a recipe that is not a stream."""
    table = open_source(name, recipe.sources[name])
    if not isinstance(table, Table):
        raise UserError(f"source {name} is a stream")
    return table


def media_state(state: str) -> str:
    """The part of `Media.state` that is about the media and not about their text."""
    return state.partition(" ")[0]


def joined(items: Sequence[Media]) -> Media:
    """One medium that several rows name, with all their texts, which are separated by semicolons.

    If they name it as different modalities, the first one counts.
    """
    first = items[0]
    same = [item for item in items if item.modality == first.modality]
    if len(same) == 1:
        return first
    states = dict.fromkeys(item.state for item in same)
    state = first.state if len(states) == 1 else f"{media_state(first.state)} {stable_hash([*states])}"
    return replace(first, state=state, text=partial(_all_texts, same))


def _all_texts(items: Sequence[Media]) -> str | None:
    return "; ".join(dict.fromkeys(text for item in items if (text := item.text()))) or None


def row_media(table: Table, row: int, column: str) -> bytes | Path | np.ndarray:
    """The media in a row of a source."""
    return table.media(table.rows([row], [column])[0][column])


def _file(path: str, modality: str, roots: Roots | None) -> Media:
    return Media(shown_name(path), modality, file_state(path), partial(_checked, path, roots))


def _checked(path: str, roots: Roots | None) -> Path:
    if not is_utf8(path):
        raise BadMedia("its name is not UTF-8, so the table cannot hold it")
    if roots is not None and os.path.islink(path):
        # A link that somebody else has put there could show the user's other files.
        target = Path(os.path.realpath(path))
        if not any(target.is_relative_to(root) for root in roots()):
            raise BadMedia("is a link out of the folders that are indexed")
    if os.path.exists(path) and not os.path.isfile(path):  # Hashing a named pipe would wait for a writer forever.
        raise BadMedia("not a file")
    return Path(path)


def _path_as_text(path: str, folders: Set[str]) -> str:
    """The path of a file, without its extension, relative to the outermost of `folders` around it; its name if there is
    none."""
    parents = [str(parent) for parent in Path(path).parents]
    folder = next((parent for parent in reversed(parents) if parent in folders), parents[0])
    return os.path.splitext(os.path.relpath(path, folder))[0]


def _caption(caption: str, roots: Roots) -> str:
    """The text in the file `caption`."""
    try:
        return file_text(_checked(caption, roots)).strip()
    except BadMedia as error:
        raise BadMedia(f"{os.path.basename(caption)}: {error}") from None


def _rows(table: Table, modality: str, column: str, text: Callable[[int], str | None]) -> Iterator[Media]:
    # Values are read here only if they are paths: bytes would be the whole data set.
    values = table.column(column) if any(table.path_of_rows(column)) else [None] * len(table)
    for row, value in enumerate(values):
        row_text = partial(text, row)
        if isinstance(value, str) or (isinstance(value, dict) and not value.get("bytes")):
            try:
                file = _file(str(table.media(value)), modality, None)
                state = f"{file.state} {table.whole_fingerprint}"
                yield replace(file, state=state, text=row_text, source=table.name, root=table.root)
                continue
            except BadMedia:
                pass  # Reading the row raises the same error, which is then recorded under the row's name.
        name = f"{table.name}/{row}/{column}"
        raw = partial(row_media, table, row, column)
        yield Media(name, modality, table.whole_fingerprint, raw, row_text, source=table.name, row=row, column=column)


def _row_text(table: Table, templates: list[str], row: int) -> str | None:
    """The texts of a row, separated by semicolons: the first template that fits, with all its values."""
    rows = table.rows([row], columns_of(templates))
    texts = next((texts for template in templates for texts in all_texts([template], rows)), [])
    return "; ".join(dict.fromkeys(texts)) or None


def _class_column(user: Any) -> str | None:
    """The column with the class of a row, if an evaluation set or a task reads one."""
    columns = (objective.class_column() for objective in getattr(user, "objectives", ()))
    return getattr(user, "label", None) or next((column.name for column in columns if column), None)
