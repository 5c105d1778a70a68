"""Streams: rows that are read in order and shuffled within windows, for data that does not fit on disk.

The order of a stream depends only on the seed. An epoch is divided into windows of `window` consecutive rows; its last
window may be shorter, because no window extends into the next epoch. Window w of epoch e is permuted by a generator
with the seed (seed, e, w). Positions count through all epochs, and each epoch contains every row exactly once. Every
reader reads all rows and keeps those that it is asked for, so shards need not be assigned to workers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from openimp.common.errors import UserError
from openimp.data.tables import Rows, matches

Named = tuple[str, dict[str, Any]]
"""A row and its name, by which a person can find it."""


class Reader(Protocol):
    """Reads the rows of one epoch in order, and can resume."""

    columns: list[str]

    def rows(self, state: dict[str, Any] | None) -> Iterator[Named]:
        """The rows from the beginning or from a state."""

    def state(self) -> dict[str, Any]:
        """The state after the last row that was taken, as plain data for JSON."""


@dataclass
class Window:
    """Consecutive rows of an epoch.

    Attributes:
        epoch, number: the epoch, and the window's number in it.
        position: position of its first row in the stream.
        state: the reader's state before the first row; None at the beginning of an epoch.
        rows: in the order of the data.
    """

    epoch: int
    number: int
    position: int
    state: dict[str, Any] | None
    rows: list[Named]

    def cursor(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "window": self.number, "position": self.position, "state": self.state}


class Stream(Rows):
    """An endless sequence of rows, read forward with one window in memory at a time.

    A pickled copy, as a worker gets it, resumes from the last cursor that was loaded.
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
        """
        Args:
            name, path, root, content: see `Rows`.
            reader: reads the rows of an epoch.
            window: number of rows that are shuffled together.
            where: filter of the rows, see `Table.filter`.

        Raises:
            UserError: there are no rows, `where` keeps none, or it names a missing column.
        """
        super().__init__(name, path, reader.columns, root, content)
        self.require(where, f"sources.{name}.where")
        self._reader = reader
        self._size = window
        self._filter = where
        self._loaded: dict[str, Any] = {"epoch": 0, "window": 0, "position": 0, "state": None}
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

        Raises:
            UserError: a shard cannot be read.
        """
        columns = self.columns if columns is None else columns
        rows: list[dict[str, Any]] = []
        self._names = {}
        while len(rows) < count:
            position = start + len(rows)
            window = self._window_at(position)
            key = np.random.SeedSequence([seed, window.epoch, window.number])
            order = np.random.default_rng(key).permutation(len(window.rows))
            for i in order[position - window.position :][: count - len(rows)]:
                name, row = window.rows[i]
                self._names[start + len(rows)] = name
                rows.append({column: row.get(column) for column in columns})
        return rows

    def row_name(self, position: int) -> str:
        """A name by which a person can find a row of the last `read`."""
        return self._names.get(position, f"{self.path}[{position}]")

    def cursor(self) -> dict[str, Any]:
        """The beginning of the current window, as plain data for JSON."""
        return self._window.cursor() if self._window else self._loaded

    def load_cursor(self, cursor: dict[str, Any]) -> None:
        """Resumes from a result of `cursor` without reading earlier rows."""
        self._loaded = cursor
        self._window = None

    def _window_at(self, position: int) -> Window:
        """The window that contains a position."""
        window = self._window
        if window is None or position < window.position:
            if position < self._loaded["position"]:
                self.load_cursor({"epoch": 0, "window": 0, "position": 0, "state": None})
            cursor = self._loaded
            self._rest = self._kept(self._reader.rows(cursor["state"]))
            window = self._take(cursor["epoch"], cursor["window"], cursor["position"], cursor["state"])
        while position >= window.position + len(window.rows):
            window = self._after(window)
        self._window = window
        return window

    def _after(self, window: Window) -> Window:
        """The next window, which is the first of the next epoch if this epoch has ended."""
        position = window.position + len(window.rows)
        if len(window.rows) == self._size:
            following = self._take(window.epoch, window.number + 1, position, self._reader.state())
            if following.rows:
                return following
        self._rest = self._kept(self._reader.rows(None))
        following = self._take(window.epoch + 1, 0, position, None)
        if not following.rows:  # The data was removed while it was read.
            raise self._empty()
        return following

    def _take(self, epoch: int, number: int, position: int, state: dict[str, Any] | None) -> Window:
        return Window(epoch, number, position, state, list(islice(self._rest, self._size)))

    def _kept(self, rows: Iterator[Named]) -> Iterator[Named]:
        """The rows that the filter keeps."""
        for named_row in rows:
            if all(matches(named_row[1].get(column), wanted) for column, wanted in self._filter.items()):
                yield named_row

    def _empty(self) -> UserError:
        kept = f" that where {self._filter!r} keeps" if self._filter else ""
        return UserError(f"source {self.name} ({self.path}) has no rows{kept}")
