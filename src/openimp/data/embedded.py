"""The vectors of the items that towers embed before the training.

They are stored in openimp's cache, in files of `ITEMS_PER_FILE` items. If embedding is stopped, the next run continues.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from openimp.common.cache import cached, stable_hash
from openimp.common.modality import BadMedia
from openimp.common.progress import Progress
from openimp.common.protocols import Towered
from openimp.data.store import (
    ROWS_FILE,
    DecodedStore,
    decoding_key,
    decoding_of,
    read_part,
    read_store,
    row_states,
    write_store,
)
from openimp.data.tables import Table
from openimp.data.templates import all_texts, columns_of, fill

ITEMS_PER_FILE = 4096
"""Items per file. After a stop, at most this many items are embedded again."""

Readers = Iterable[Callable[[], Any]]
"""Functions that return the raw values of items, or raise BadMedia."""


def embed_column(table: Table, modality: Any, column: str, views: list[Any], progress: Progress | None) -> DecodedStore:
    """The vectors of the media in a table's column, by row."""

    def readers_of(rows: range) -> Readers:
        return (partial(table.media, row[column]) for chunk in table.chunks(rows, [column]) for row in chunk)

    code = decoding_key(modality, views)
    return _embed(modality, code, f"{table.name}.{column}", row_states(table, column), readers_of, progress)


class EmbeddedTexts:
    """The vectors of texts: `texts[text]`."""

    def __init__(self, modality: Towered, texts: Iterable[str], progress: Progress | None) -> None:
        distinct = list(dict.fromkeys(texts))

        def readers_of(numbers: range) -> Readers:
            return (partial(str, distinct[number]) for number in numbers)

        self._store = _embed(modality, decoding_of(modality), "texts", distinct, readers_of, progress)
        self._number = {text: number for number, text in enumerate(distinct)}

    def __getitem__(self, text: str) -> np.ndarray:
        """The vectors (crops, features) of a text. BadMedia if it could not be embedded."""
        return self._store[self._number[text]]


class EmbeddedRows:
    """The vectors of the texts that evaluation makes of a table's rows: `texts[row]`."""

    def __init__(self, table: Table, modality: Towered, templates: list[str], progress: Progress | None) -> None:
        self._texts = [*_evaluation_texts(table, templates)]
        readable = (text for text in self._texts if isinstance(text, str))
        self._vectors = EmbeddedTexts(modality, readable, progress)

    def __getitem__(self, row: int) -> np.ndarray:
        """The vectors of a row's text; BadMedia if it has none."""
        text = self._texts[row]
        if isinstance(text, BadMedia):
            raise text
        return self._vectors[text]


def _evaluation_texts(table: Table, templates: list[str]) -> Iterator[str | BadMedia]:
    for row in _text_rows(table, templates):
        try:
            yield fill(templates, row)
        except BadMedia as error:
            yield error


def texts_in(table: Table, templates: list[str]) -> Iterator[str]:
    """All texts that training may draw from a table."""
    return chain.from_iterable(all_texts(templates, _text_rows(table, templates)))


def _text_rows(table: Table, templates: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a table with the columns of some templates."""
    return chain.from_iterable(table.chunks(range(len(table)), columns_of(templates)))


def _embed(
    modality: Towered,
    code: list[Any],
    name: str,
    states: list[Any],
    readers_of: Callable[[range], Readers],
    progress: Progress | None,
) -> DecodedStore:
    """Embeds items, except those that an earlier run has embedded.

    `code` determines how an item is embedded. `name` is shown with the progress. `states` has a value for each item
    that changes with it. For a range of item numbers, `readers_of` returns the functions that read these items.
    """

    def write(folder: Path, part: range) -> None:
        description = f"embedding {name}, up to item {part.stop:,} of {len(states):,}"
        bar = progress(part, description) if progress else part
        write_store(folder, (vectors for _, vectors in zip(bar, modality.embed_all(readers_of(part)))))

    def checked_file(folder: Path) -> Path:
        read_part(folder / ROWS_FILE)
        return folder / ROWS_FILE

    files = []
    for start in range(0, len(states), ITEMS_PER_FILE):
        part = range(start, min(start + ITEMS_PER_FILE, len(states)))
        key = stable_hash([*code, *states[start : part.stop]])
        files.append(cached("embedded", key, checked_file, partial(write, part=part)))
    return read_store(*files)
