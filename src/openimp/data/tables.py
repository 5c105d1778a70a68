"""Tables: rows by number. A row is a dict of columns. Media are raw bytes or a path, never decoded."""

import bisect
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from openimp.common.cache import stable_hash
from openimp.common.digests import COMPARED_BYTES, UNREADABLE, digests
from openimp.common.errors import UserError, counted, nearest
from openimp.common.modality import BadMedia
from openimp.common.progress import Progress
from openimp.common.schema import as_text
from openimp.common.texts import text_key
from openimp.data.files import inside
from openimp.recipe.tasks import Part

MAX_CHECKED_FILES = 10_000
"""Most media files of a source that are opened at every start, to see whether one has changed."""
READ_ROWS = 256
"""Rows that are read at once. They are few because a row may hold a whole picture or clip."""


@dataclass(frozen=True)
class Unreadable:
    """A value that cannot or must not be read; `Rows.media` raises BadMedia with its reason."""

    reason: str


REST = "[the rest]"
"""End of the name of the row that stands for the unreadable rest of a file."""


class UnreadableRest(Unreadable):
    """The value of each column in the row that stands for the unreadable rest of a file. No filter drops that row."""


class Rows:
    """Base of tables and streams."""

    lanes = 0  # number of lanes of a stream; a table has none

    def __init__(self, name: str, path: str, columns: list[str], root: Path | None, content: Callable[[], str]) -> None:
        self.name = name  # in the recipe
        self.path = path  # where it was opened from, for messages
        self.columns = columns
        self.root = root  # the folder to which paths in the columns are relative, and which they cannot leave
        self._content = content  # returns a hash of the content; called when `fingerprint` is first read

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content. It changes with the data, but not if the data is moved.

        Data files count with their names, and with `COMPARED_BYTES` of their content (of each file an equal share), a
        shard at a URL with its name. A file in a folder source counts with its name and size, a caption with its
        content. Media files that rows name do not count, because reading them at every start would take too long. Of a
        table, the selected rows count, and of a stream its filter.
        """
        return self._content()

    def fingerprint_with_files(self, columns: Iterable[str]) -> str:
        """Hash of `fingerprint` and of the media files in these columns of a table."""
        return self.fingerprint

    def require(self, columns: Iterable[str], user: str = "") -> None:
        """Raises UserError if a column is missing. `user` is the part of the recipe that reads it, for the message."""
        for column in columns:
            if column not in self.columns:
                prefix = f"{user}: " if user else ""
                known = nearest(column, self.columns)
                raise UserError(f"{prefix}source {self.name} ({self.path}) has no column {column!r}{known}")

    def media(self, value: Any) -> bytes | Path | np.ndarray:
        """Converts a row's value to an input of `Modality.decode`: bytes, a file inside `root`, or an array.

        The value may be bytes, a path relative to `root`, the `{"bytes": ..., "path": ...}` of Hugging Face data sets,
        or (nested) lists of numbers; anything else is BadMedia.
        """
        if isinstance(value, Unreadable):
            raise BadMedia(value.reason)
        if isinstance(value, dict):
            if not {"bytes", "path"} & value.keys():
                raise BadMedia(f"expected bytes or a path, found the keys {', '.join(map(str, value)):.200}")
            value = value.get("bytes") or value.get("path")
        if _is_missing(value):
            raise BadMedia("the column is empty here")
        if isinstance(value, bytes):
            return value
        if isinstance(value, str):
            return self.file(value)
        if isinstance(value, list):
            return number_array(value)
        raise BadMedia(f"expected bytes, a path or numbers, found {type(value).__name__}")

    def file(self, path: str) -> Path:
        """The file at a path in a column. BadMedia if it is not inside `root`."""
        if self.root is None:
            raise BadMedia(
                f"{path:.200}: a source at a URL has no files of this machine, unless root names their folder"
            )
        return inside(self.root, path)


class Table(Rows):
    """Rows of an Arrow table, by number and in a fixed order: in memory, or memory-mapped by `datasets`.

    A table can be pickled and forked into workers. `keep_where`, `keep_part` and `keep_at_most` select rows. Row
    numbers count the selected rows; stored numbers count all rows of the Arrow table.
    """

    _kept: np.ndarray | None = None  # the stored numbers of the selected rows; None: all are selected

    def __init__(
        self,
        name: str,
        path: str,
        data: Any,  # a pyarrow.Table, or a `datasets.table.Table`, which pickles its path instead of its rows
        content: Callable[[bool], str],  # returns a hash of the content; if the argument is true, of every byte
        root: Path | None,
        *,
        files: Sequence[tuple[str, int]] = (),  # (name, number of rows) of each file that the rows are from, in order
        label: str | None = None,  # the column with the row names; None: rows are named by their file and number
        text_functions: Mapping[str, Callable[[Any], Any]] | None = None,  # by column, from stored value to text
    ) -> None:
        super().__init__(name, path, list(data.column_names), root, partial(content, False))
        self._whole_content = partial(content, True)
        self._data = data
        self._files = files
        self._ends = list(accumulate(rows for _, rows in files))
        self._label = label
        self._text_functions = text_functions or {}

    def __len__(self) -> int:
        return self._data.num_rows if self._kept is None else len(self._kept)

    def rows(self, indices: Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The rows with these numbers, in this order, with the given columns or all."""
        columns = self.columns if columns is None else columns
        stored = self._stored(indices)
        values = [self._values(column, stored) for column in columns]
        if not columns:
            return [{} for _ in stored]
        return [dict(zip(columns, row)) for row in zip(*values)]

    def iterate(self, columns: Sequence[str], indices: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
        """The rows with these numbers, or all, in this order. Reads `READ_ROWS` at a time."""
        indices = range(len(self)) if indices is None else indices
        for start in range(0, len(indices), READ_ROWS):
            yield from self.rows(indices[start : start + READ_ROWS], columns)

    def column(self, name: str) -> list[Any]:
        """All values of a column, in memory: use it for texts and labels."""
        return self._values(name, self._stored(range(len(self))))

    def row_name(self, i: int) -> str:
        """A name by which a person can find row `i`: its file, or `stills.parquet[123]`."""
        stored = int(self._stored([i])[0])
        if self._label:
            return self._data.column(self._label)[stored].as_py()
        file_number = bisect.bisect_right(self._ends, stored)
        file, rows = self._files[file_number]
        return f"{file}[{stored - (self._ends[file_number] - rows)}]"

    def path_of_rows(self, column: str) -> list[str | None]:
        """The path of the media file of each selected row. None for media that the table itself holds."""
        values = self._data.column(column)
        if pa.types.is_struct(values.type) and values.type.get_field_index("path") >= 0:
            paths = pc.struct_field(values, "path")
            if values.type.get_field_index("bytes") >= 0:
                paths = pc.if_else(pc.is_valid(pc.struct_field(values, "bytes")), None, paths)
            values = paths
        if not _is_text(values.type):
            return [None] * len(self)
        if self._kept is not None:
            values = values.take(pa.array(self._kept))
        return values.to_pylist()

    @cached_property
    def fingerprint(self) -> str:
        return self._of_selected(self._content())

    @cached_property
    def whole_fingerprint(self) -> str:
        """Like `fingerprint`, but of every byte, as a key of cached data must be. It may read all data files."""
        return self._of_selected(self._whole_content())

    def _of_selected(self, content: str) -> str:
        return content if self._kept is None else f"{content}-{stable_hash([self._kept.tobytes()])}"

    def fingerprint_with_files(self, columns: Iterable[str]) -> str:
        """Hash of `fingerprint` and of the media files in these columns: all or, of more than 10,000, every n-th.

        Of all of them, at most `COMPARED_BYTES` are read, of each an equal share.
        """
        paths = list(dict.fromkeys(path for column in columns for path in self.path_of_rows(column) if path))
        checked = evenly_spaced(paths)
        share = COMPARED_BYTES // max(1, len(checked))
        return stable_hash([self.fingerprint, *zip(checked, self.file_digests(checked, share))])

    def file_digests(
        self, paths: Sequence[str], most: int | None = None, progress: Progress | None = None, description: str = ""
    ) -> list[str]:
        """`digests` of the media files at these paths in a column."""
        files: dict[str, Path] = {}
        for path in paths:
            with suppress(BadMedia):
                files[path] = self.file(path)
        digest_of = dict(zip(files, digests(files.values(), most, progress, description)))
        return [digest_of.get(path, UNREADABLE) for path in paths]

    def keep_where(self, where: dict[str, Any]) -> "Table":
        """Drops the rows that do not match a source's `where`, see `matches`. Returns this table."""
        self.require(where, f"sources.{self.name}.where")
        for column, wanted in where.items():
            mask = self._matching(column, wanted)
            if not mask.any():
                first_rows = self.iterate([column], range(min(len(self), 1000)))
                values = sorted({f"{as_text(row[column]):.60}" for row in first_rows})[:5]
                condition = f"other than {wanted['not']!r}" if isinstance(wanted, dict) else f"= {wanted!r}"
                raise UserError(
                    f"source {self.name} ({self.path}): no row has {column} {condition}; it holds {', '.join(values)}"
                )
            self._keep(np.flatnonzero(mask))
        return self

    def _matching(self, column: str, wanted: Any) -> np.ndarray:
        """Which of the selected rows match in a column, see `matches`."""
        cells = self._data.column(column)
        text_of = self._text_functions.get(column)
        mask = None
        if _is_text(cells.type) and text_of is None:
            mask = _text_mask(cells, wanted)
        elif (pa.types.is_primitive(cells.type) and not pa.types.is_float16(cells.type)) or _is_text(cells.type):
            text_of = text_of or (lambda value: value)
            values = [value for value in cells.unique().to_pylist() if matches(text_of(value), wanted)]
            mask = pc.is_in(cells, value_set=pa.array(values, cells.type)).to_numpy()
        elif _is_media(cells.type) and wanted == {"not": None}:  # Reading all media would take hours.
            mask = _has_media(cells)
        if mask is not None:
            return mask if self._kept is None else mask[self._kept]
        return np.array([matches(row[column], wanted) for row in self.iterate([column])], bool)

    def keep_part(self, part: Part | None) -> "Table":
        """Drops the rows that are not in the parts of a source's `part`. Returns this table."""
        if part is None:
            return self
        if part.by:
            self.require([part.by], f"sources.{self.name}.part")
        kept_rows = [row for row, number in enumerate(self.parts(part.of, part.by)) if part.selects(number)]
        if not kept_rows:
            raise UserError(
                f"source {self.name} ({self.path}): part: none of {counted(len(self), 'row')} is in these parts"
            )
        return self._keep(kept_rows)

    def parts(self, of: int, by: str | None) -> list[int]:
        """The part of each selected row, see `part_of`."""
        rows = self.iterate([by] if by else [])
        stored_rows = self._stored(range(len(self)))
        return [part_of(row[by] if by else None, stored, of) for row, stored in zip(rows, stored_rows)]

    def keep_at_most(self, limit: int | None) -> "Table":
        """Drops all but `limit` evenly spaced rows. Returns this table."""
        if limit is None or limit >= len(self):
            return self
        return self._keep(np.arange(limit) * len(self) // limit)

    def _keep(self, rows: np.ndarray | list[int]) -> "Table":
        self._kept = np.asarray(rows) if self._kept is None else self._kept[rows]
        return self

    def stored_rows(self, rows: np.ndarray) -> np.ndarray:
        """(N,) int64, the numbers that selected rows have in the data, without any selection."""
        return rows if self._kept is None else self._kept[rows]

    def _stored(self, indices: Sequence[int]) -> Sequence[int]:
        """The stored numbers of selected rows."""
        return indices if self._kept is None else self._kept[np.asarray(indices, dtype=np.int64)].tolist()

    def arrow(self, rows: range) -> Any:
        """Consecutive rows as a pyarrow.Table, with the values of `Table.rows`; unreadable texts are null."""
        stored = self._stored(rows)
        if self._kept is None or not rows:
            parts = [self._data.slice(rows.start, len(rows))]
        else:  # One row at a time, because `take` would first copy all chunks of a column into one.
            parts = [self._data.slice(row, 1) for row in stored]
        data = pa.concat_tables([getattr(part, "table", part) for part in parts])  # `datasets` wraps its tables.
        for column in self._text_functions:
            index = data.column_names.index(column)
            is_list = pa.types.is_nested(data.schema.field(index).type)
            texts = [None if isinstance(value, Unreadable) else value for value in self._values(column, stored)]
            text_type = pa.list_(pa.string()) if is_list else pa.string()
            data = data.set_column(index, column, pa.array(texts, text_type))
        return data.replace_schema_metadata(None)

    def _values(self, column: str, stored: Sequence[int]) -> list[Any]:
        """The values of a column in the rows with these stored numbers."""
        chunked = self._data.column(column)
        if isinstance(stored, range) and stored.step == 1:
            values = chunked.slice(stored.start, len(stored)).to_pylist()
        else:  # One scalar at a time, because `take` would first copy all chunks of the column into one.
            values = [chunked[int(row)].as_py() for row in stored]
        text_of = self._text_functions.get(column)
        return [text_of(value) for value in values] if text_of else values


def evenly_spaced(files: Sequence[str]) -> Sequence[str]:
    """All files, or of more than `MAX_CHECKED_FILES` every n-th."""
    return files[:: max(1, -(-len(files) // MAX_CHECKED_FILES))]


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def number_array(value: list[Any] | np.ndarray) -> np.ndarray:
    """An array of (nested) lists of numbers; anything else is BadMedia."""
    try:
        array = np.array(value)
    except ValueError:
        raise BadMedia("expected lists of equal length") from None
    if array.dtype.kind not in "biuf":
        raise BadMedia("expected numbers in the list, found something else among them")
    return array


def item_key(value: Any) -> str | None:
    """The `text_key` of a value, after its conversion to text. Rows with equal keys are one item. None: no value."""
    if isinstance(value, Unreadable) or _is_missing(value):
        return None
    return text_key(as_text(value)) or None


def item_content(value: Any) -> bytes:
    """What rows of the same item have in common: the bytes of media, or else the `item_key`. b"": no value."""
    content = _unwrapped(value)
    return content if isinstance(content, bytes) else (item_key(content) or "").encode()


def item_id(value: Any, row: int) -> int:
    """A hash that rows of the same item share, see `item_content`. A row without a value is an item of its own."""
    return _hash(item_content(value) or f"\nrow {row}".encode(), signed=True)  # No text's key has a line break.


def value_id(value: Any) -> int:
    """A hash that equal values share, see `item_key`. It never equals an `item_id`, because the contrastive loss
    compares ids of both kinds."""
    return _hash(f"\nvalue {item_key(value)}".encode(), signed=True)


def part_of(value: Any, row: int, of: int) -> int:
    """The part that a row with this value is in, from 0; without a value, it follows from the number of the row."""
    return _hash(item_content(value) or f"row {row}".encode(), signed=False) % of


def _hash(content: bytes, signed: bool) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=signed)


def _text_mask(cells: pa.ChunkedArray, wanted: Any) -> np.ndarray:
    """(N,) bool, which cells of a column of texts match, see `matches`."""
    if isinstance(wanted, dict):
        return ~_text_mask(cells, wanted["not"])
    texts = _as_texts(wanted)
    # An empty text counts as missing.
    values = pa.array(["" if text is None else text for text in texts], cells.type)
    mask = pc.is_in(cells, value_set=values).to_numpy()
    return mask | cells.is_null().to_numpy() if None in texts else mask


def _is_media(kind: pa.DataType) -> bool:
    """Whether cells of a type are bytes, or the `{"bytes": ..., "path": ...}` of Hugging Face data sets."""
    is_pair = pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}
    return is_pair or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _has_media(cells: pa.ChunkedArray) -> np.ndarray:
    """(N,) bool, which cells of such a column are not empty. Only lengths are read."""
    is_struct = pa.types.is_struct(cells.type)
    fields = [pc.struct_field(cells, name) for name in ("bytes", "path")] if is_struct else [cells]
    # A field without any value may have the type null, which has no length.
    lengths = [pc.binary_length(field.cast(pa.large_binary())) for field in fields]
    return np.logical_or.reduce([pc.fill_null(length, 0).to_numpy() > 0 for length in lengths])


def matches(cell: Any, wanted: Any) -> bool:
    """Whether a cell is a wanted value or, if it is a list, contains one. An `UnreadableRest` always matches.

    `{"not": unwanted}` matches the cells that `unwanted` does not. None is a cell without a value.

    Values are compared as text, because the cells of a CSV file have no type. 1.0 is 1, because pandas makes floats of
    integers if one is missing.
    """
    if isinstance(cell, UnreadableRest):
        return True
    if isinstance(wanted, dict):
        return not matches(cell, wanted["not"])
    items = cell if isinstance(cell, list) and cell else [cell]
    texts = _as_texts(wanted)
    if None in texts and any(_is_missing(_unwrapped(item)) for item in items):
        return True
    return any(
        item is not None
        and (as_text(item) in texts or (isinstance(item, float) and item.is_integer() and str(int(item)) in texts))
        for item in items
    )


def _unwrapped(value: Any) -> Any:
    """The bytes or the path in the `{"bytes": ..., "path": ...}` of Hugging Face data sets; other values unchanged."""
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        return value.get("bytes") or value.get("path")
    return value


def _is_missing(value: Any) -> bool:
    """Whether a value is None, NaN or empty."""
    return value is None or value != value or (isinstance(value, str | bytes | list) and not value)


def _as_texts(wanted: Any) -> list[str | None]:
    values = wanted if isinstance(wanted, list) else [wanted]
    return [None if value is None else as_text(value) for value in values]
