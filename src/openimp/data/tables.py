"""Tables: rows by number. A row is a dict of columns, with media as raw bytes or as a path, never decoded."""

import bisect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from openimp.common.errors import UserError, nearest
from openimp.common.modality import BadMedia
from openimp.common.schema import as_text
from openimp.data.files import digest, inside, stable_hash

LOOKED_AT = 10_000
"""Files of a source that are opened at every start to see whether one has changed."""


@dataclass(frozen=True)
class Unreadable:
    """Stands in a row for a value that must not be read; `media` raises its reason."""

    reason: str


class UnreadableRest(Unreadable):
    """Stands in every column of the one row that is left of an unreadable rest of a file; no filter drops it."""


class Rows:
    """What tables and streams share.

    Attributes:
        name: what the recipe calls the source.
        path: what it was opened from, for messages.
        columns: the columns of its rows.
        root: the folder that paths in its columns start at and never leave.
    """

    def __init__(self, name: str, path: str, columns: list[str], root: Path | None) -> None:
        self.name = name
        self.path = path
        self.columns = columns
        self.root = root

    def require(self, columns: Iterable[str], user: str = "") -> None:
        """Raises UserError, which names the nearest column, unless all of these are there.

        Args:
            columns: what will be read.
            user: the part of the recipe that wants them, for the message.
        """
        for column in columns:
            if column not in self.columns:
                where = f"{user}: " if user else ""
                raise UserError(
                    f"{where}source {self.name} ({self.path}) has no column {column!r}{nearest(column, self.columns)}"
                )

    def media(self, value: Any) -> bytes | Path | np.ndarray:
        """A row's value as what `Modality.decode` takes: the bytes, a file inside `root`, or an array.

        Takes bytes, a path relative to `root`, the `{"bytes": ..., "path": ...}` of Hugging Face data sets, or a
        list of numbers, or of equally long lists of them.

        Raises:
            BadMedia: nothing is there, or the path leaves `root`.
        """
        if isinstance(value, Unreadable):
            raise BadMedia(value.reason)
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if value is None or value in (b"", "", []):
            raise BadMedia("the column is empty here")
        if isinstance(value, bytes):
            return value
        if isinstance(value, str) and self.root is not None:
            return inside(self.root, value)
        if isinstance(value, list):
            return _array(value)
        raise BadMedia(f"expected bytes, a path or numbers, found {type(value).__name__}")


class Table(Rows, ABC):
    """Rows by number, in an order that never changes. It pickles into workers and may be forked."""

    _kept: np.ndarray | None = None

    @abstractmethod
    def _size(self) -> int:
        """Rows before `keep`."""

    @abstractmethod
    def _column(self, column: str, rows: Sequence[int]) -> list[Any]:
        """One column at these rows, counted before `keep`."""

    @abstractmethod
    def _row_name(self, row: int) -> str:
        """A name for a row, counted before `keep`."""

    @abstractmethod
    def _content(self) -> str:
        """Names the content, whatever is kept of it."""

    @abstractmethod
    def paths(self, column: str) -> list[str]:
        """The paths in a column, of the rows whose bytes are not in the table itself."""

    def __len__(self) -> int:
        return self._size() if self._kept is None else len(self._kept)

    def rows(self, indices: Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The rows with these numbers, in this order, with all columns or the given ones only."""
        columns = self.columns if columns is None else columns
        stored = self._stored(indices)
        values = [self._column(column, stored) for column in columns]
        return [dict(zip(columns, row)) for row in zip(*values)] if columns else [{} for _ in stored]

    def column(self, name: str) -> list[Any]:
        """A whole column; for texts and labels, as it is held in memory."""
        return self._column(name, self._stored(range(len(self))))

    def row_name(self, i: int) -> str:
        """A name for row `i` that a person can find: its file, or `stills.parquet[123]`."""
        return self._row_name(self._stored([i])[0])

    @cached_property
    def fingerprint(self) -> str:
        """Names the content and what is kept of it; the same after the data has moved, another when it has changed.

        Data files count by name, size and up to 64 blocks of content (all of a file up to 4 MiB), the files of a folder
        by name and size, and the files that a manifest names not at all: to read those at every start takes too long.
        """
        kept = "" if self._kept is None else "-" + stable_hash([self._kept.tobytes()])
        return self._content() + kept

    def fingerprint_with_files(self, columns: Iterable[str]) -> str:
        """Names what `fingerprint` does, and the files in these columns: all, or 10,000 that are evenly spread."""
        paths = list(dict.fromkeys(path for column in columns for path in self.paths(column)))
        looked_at = paths[:: max(1, -(-len(paths) // LOOKED_AT))]
        return stable_hash([self.fingerprint, *((path, self.file_state(path)) for path in looked_at)])

    def file_state(self, path: str) -> str:
        """Names a file that a column names by its size, beginning and end only, for there may be many."""
        assert self.root is not None
        try:
            return digest(inside(self.root, path), blocks=2, block=4096)
        except (BadMedia, OSError):
            return "bad"

    def keep(self, where: dict[str, Any]) -> "Table":
        """Keeps the rows whose column has the value that `where` gives, or one of its values; gives the table back.

        A list matches if one of its items does. Values are compared as text, for the cells of a CSV file have no type.

        Raises:
            UserError: no such column, or no row is left.
        """
        self.require(where, f"sources.{self.name}.where")
        for column, wanted in where.items():
            cells = self.column(column)
            kept = [i for i, cell in enumerate(cells) if matches(cell, wanted)]
            if not kept:
                values = sorted({as_text(cell) for cell in cells[:1000]})[:5]
                raise UserError(
                    f"source {self.name} ({self.path}): no row has {column} = {wanted!r}; it holds {', '.join(values)}"
                )
            self._kept = np.asarray(self._stored(kept), dtype=np.int64)
        return self

    def thin(self, limit: int | None) -> "Table":
        """Keeps at most `limit` rows, evenly spaced; gives the table back."""
        if limit is not None and limit < len(self):
            spaced = np.arange(limit) * len(self) // limit
            self._kept = np.asarray(self._stored(spaced.tolist()), dtype=np.int64)
        return self

    def _stored(self, indices: Sequence[int]) -> Sequence[int]:
        """Numbers of rows before `keep`."""
        return indices if self._kept is None else self._kept[np.asarray(indices, dtype=np.int64)].tolist()


class ArrowTable(Table):
    """Rows of an Arrow table, in memory or memory-mapped by `datasets`."""

    def __init__(
        self,
        name: str,
        path: str,
        data: Any,
        content: Callable[[], str],
        root: Path | None,
        files: Sequence[tuple[str, int]] = (),
        names: dict[str, list[str]] | None = None,
        label: str | None = None,
    ) -> None:
        """
        Args:
            name, path, root: see `Rows`.
            data: a pyarrow.Table, or the `datasets.table.Table` around one, which pickles by path.
            content: gives the fingerprint; called when it is asked for.
            files: what the rows were read from, in order: (name, rows).
            names: the classes' names of columns that hold class numbers (`datasets.ClassLabel`).
            label: the column that names a row; left out, its file and number do.
        """
        super().__init__(name, path, list(data.column_names), root)
        self._data = data
        self._fingerprint = content
        self._files = [file for file, _ in files]
        self._ends = list(accumulate(rows for _, rows in files))
        self._names = names or {}
        self._label = label

    def _size(self) -> int:
        return self._data.num_rows

    def _column(self, column: str, rows: Sequence[int]) -> list[Any]:
        # One scalar at a time: `take` would first copy a column of many chunks into one, the whole data set.
        chunked = self._data.column(column)
        values = [chunked[int(row)].as_py() for row in rows]
        names = self._names.get(column)
        # datasets.ClassLabel; -1 means that the class is not known.
        return [None if value is None or value < 0 else names[value] for value in values] if names else values

    def _row_name(self, row: int) -> str:
        if self._label:
            return self._data.column(self._label)[int(row)].as_py()
        file = bisect.bisect_right(self._ends, row)
        return f"{self._files[file]}[{row - (self._ends[file - 1] if file else 0)}]"

    def _content(self) -> str:
        return self._fingerprint()

    def paths(self, column: str) -> list[str]:
        import pyarrow as pa
        import pyarrow.compute as pc

        values = self._data.column(column)
        rows: Sequence[int] = range(len(self)) if self._kept is None else self._kept.tolist()
        if pa.types.is_struct(values.type) and values.type.get_field_index("path") >= 0:
            embedded = pc.is_valid(pc.struct_field(values, "bytes"))
            values = pc.struct_field(values, "path")
            rows = [row for row in rows if not embedded[row].as_py()]
        if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
            return []
        return [path for path in (values[row].as_py() for row in rows) if path]


def _array(value: list[Any]) -> np.ndarray:
    try:
        array = np.array(value)
    except ValueError:
        raise BadMedia("expected lists of equal length") from None
    if array.dtype.kind not in "biuf":
        raise BadMedia("expected numbers in the list, found something else among them")
    return array


def matches(cell: Any, wanted: Any) -> bool:
    """Whether a filter keeps a cell: the cell or one of its items has a wanted value, or it is an `UnreadableRest`."""
    if isinstance(cell, UnreadableRest):
        return True
    cells = cell if isinstance(cell, list) else [cell]
    texts = [as_text(item) for item in (wanted if isinstance(wanted, list) else [wanted])]
    return any(item is not None and as_text(item) in texts for item in cells)
