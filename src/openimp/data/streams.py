"""Streams: rows that are read in order and shuffled within windows, for data that does not fit on disk.

The order of a stream depends only on the seed. An epoch is divided into windows of `window` consecutive rows; its last
window may be shorter, because no window extends into the next epoch. Window w of epoch e is permuted by a generator
with the seed (seed, e, w). Positions count through all epochs, and each epoch contains every row exactly once. Every
reader reads all rows and keeps those that it is asked for, so shards need not be assigned to workers.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from openimp.common.errors import UserError
from openimp.data.tables import Rows, matches

Named = tuple[str, dict[str, Any]]
"""A row and its name, by which a person can find it."""
Cursor = dict[str, Any]
"""Where a window begins: the `epoch`, the window's number in it (`window`), the `position` of its first row in the
stream, and the reader's `state` before that row, which is None at the beginning of an epoch."""
START: Cursor = {"epoch": 0, "window": 0, "position": 0, "state": None}


class Reader(Protocol):
    """Reads the rows of one epoch in order, and can resume."""

    columns: list[str]

    def rows(self, state: dict[str, Any] | None) -> Iterator[Named]:
        """The rows from the beginning or from a state."""

    def state(self) -> dict[str, Any]:
        """The state after the last row that was taken, as plain data for JSON."""


class Window(NamedTuple):
    """Consecutive rows of an epoch, in the order of the data."""

    cursor: Cursor
    rows: list[Named]


class Stream(Rows):
    """An endless sequence of rows, read forward with one window in memory at a time.

    A pickled copy, as a worker gets it, resumes from the last cursor that was loaded. `window` is the number of rows
    that are shuffled together, and `where` filters the rows as `Table.filter` does.
    """

    def __init__(
        self,
        name: str,
        path: str,
        reader: Reader,
        root: Path | None,
        window: int,
        where: dict[str, Any],
        content: Callable[[], str],
    ) -> None:
        super().__init__(name, path, reader.columns, root, content)
        self.require(where, f"sources.{name}.where")
        self._reader = reader
        self._size = window
        self._filter = where
        self._loaded = START
        self._rest: Iterator[Named] = iter(())
        self._window: Window | None = None
        self._names: dict[int, str] = {}
        if next(self._kept(reader.rows(None)), None) is None:
            raise self._empty()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rest": iter(()), "_window": None, "_names": {}}

    @property
    def fingerprint(self) -> str:
        """Hash of the content and of the filter. Data that is not on disk counts with its name only."""
        return self._content()

    def read(self, seed: int, start: int, count: int, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The rows at positions start .. start + count - 1, with the given columns or all.

        Skipping ahead reads the rows in between. Going back before the current window restarts from the last loaded
        cursor or from the beginning.
        """
        columns = self.columns if columns is None else columns
        rows: list[dict[str, Any]] = []
        self._names = {}
        while len(rows) < count:
            position = start + len(rows)
            cursor, named = self._window_at(position)
            key = np.random.SeedSequence([seed, cursor["epoch"], cursor["window"]])
            order = np.random.default_rng(key).permutation(len(named))
            for i in order[position - cursor["position"] :][: count - len(rows)]:
                name, row = named[i]
                self._names[start + len(rows)] = name
                rows.append({column: row.get(column) for column in columns})
        return rows

    def row_name(self, position: int) -> str:
        """A name by which a person can find a row of the last `read`."""
        return self._names.get(position, f"{self.path}[{position}]")

    def cursor(self) -> Cursor:
        """The beginning of the current window, as plain data for JSON."""
        return self._window.cursor if self._window else self._loaded

    def load_cursor(self, cursor: Cursor) -> None:
        """Resumes from a result of `cursor` without reading earlier rows."""
        self._loaded = cursor
        self._window = None

    def _window_at(self, position: int) -> Window:
        """The window that contains a position."""
        window = self._window
        if window is None or position < window.cursor["position"]:
            if position < self._loaded["position"]:
                self.load_cursor(START)
            self._rest = self._kept(self._reader.rows(self._loaded["state"]))
            window = self._take(self._loaded)
        while position >= window.cursor["position"] + len(window.rows):
            window = self._after(window)
        self._window = window
        return window

    def _after(self, window: Window) -> Window:
        """The next window, which is the first of the next epoch if this epoch has ended."""
        epoch, number = window.cursor["epoch"], window.cursor["window"]
        position = window.cursor["position"] + len(window.rows)
        if len(window.rows) == self._size:
            state = self._reader.state()
            following = self._take({"epoch": epoch, "window": number + 1, "position": position, "state": state})
            if following.rows:
                return following
        self._rest = self._kept(self._reader.rows(None))
        following = self._take({**START, "epoch": epoch + 1, "position": position})
        if not following.rows:  # The data was removed while it was read.
            raise self._empty()
        return following

    def _take(self, cursor: Cursor) -> Window:
        return Window(cursor, list(islice(self._rest, self._size)))

    def _kept(self, rows: Iterator[Named]) -> Iterator[Named]:
        """The rows that the filter keeps."""
        for named_row in rows:
            if all(matches(named_row[1].get(column), wanted) for column, wanted in self._filter.items()):
                yield named_row

    def _empty(self) -> UserError:
        kept = f" that where {self._filter!r} keeps" if self._filter else ""
        return UserError(f"source {self.name} ({self.path}) has no rows{kept}")
