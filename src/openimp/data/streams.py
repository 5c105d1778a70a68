"""Streams: rows in order, shuffled within windows, for data that does not fit the disk.

A stream's order is a pure function of the seed, whatever the number of workers: an epoch is cut into windows of
`window` consecutive examples (the last of an epoch may be shorter: none crosses into the next), and window w of epoch
e is permuted by the generator seeded with (seed, e, w). The positions of the stream run on through the epochs, and each
epoch gives every example exactly once. Every reader reads everything and keeps what it is asked for, so that no shard
has to be dealt out.
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
"""A row with a name for it that a person can find."""


class Reader(Protocol):
    """The rows of one epoch, in order, which can be gone on with from where they stood."""

    columns: list[str]

    def rows(self, state: dict[str, Any] | None) -> Iterator[Named]:
        """The rows from the beginning, or from where `state` was taken."""

    def state(self) -> dict[str, Any]:
        """Where the rows stand, after the last one that was taken; plain data for JSON."""


@dataclass
class Window:
    """Consecutive rows of an epoch.

    Attributes:
        epoch, number: which window it is.
        position: of its first row in the stream.
        state: the reader's before its first row; None at the beginning of an epoch.
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
    """An endless sequence of rows, read forward, one window in memory at a time.

    It pickles into workers without what it has read; the copy goes on from the last cursor that was loaded.
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
            name, path, root: see `Rows`.
            reader: gives the rows of an epoch.
            window: rows that are shuffled together.
            where: see `Table.keep`.
            content: gives the fingerprint; called when it is asked for.

        Raises:
            UserError: no row, no such column in `where`, or no row that it keeps.
        """
        super().__init__(name, path, reader.columns, root)
        self.require(where, f"sources.{name}.where")
        self._reader = reader
        self._size = window
        self._filter = where
        self._content = content
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
        """Names the content and the filter, as `Table.fingerprint` does; what is not on disk counts by name only."""
        return self._content()

    def read(self, seed: int, start: int, count: int, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The rows at positions start .. start + count - 1, with all columns or the given ones.

        Reading on is cheap, skipping ahead reads what lies between, and going back before the current window starts
        anew from the last loaded cursor, or from the beginning.

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
        """A name that a person can find for a row of the last `read`."""
        return self._names.get(position, f"{self.path}[{position}]")

    def cursor(self) -> dict[str, Any]:
        """Where the stream stands: the beginning of the current window, as plain data for JSON."""
        return self._window.cursor() if self._window else self._loaded

    def load_cursor(self, cursor: dict[str, Any]) -> None:
        """Goes on from what `cursor` gave, without reading what came before."""
        self._loaded = cursor
        self._window = None

    def _window_at(self, position: int) -> Window:
        """The window that holds a position."""
        window = self._window
        if window is None or position < window.position:
            if position < self._loaded["position"]:
                self.load_cursor({"epoch": 0, "window": 0, "position": 0, "state": None})
            window = self._restart(self._loaded)
        while position >= window.position + len(window.rows):
            window = self._after(window)
        self._window = window
        return window

    def _restart(self, cursor: dict[str, Any]) -> Window:
        self._rest = self._kept(self._reader.rows(cursor["state"]))
        return self._take(cursor["epoch"], cursor["window"], cursor["position"], cursor["state"])

    def _after(self, window: Window) -> Window:
        """The next window: of the same epoch, unless that has ended."""
        position = window.position + len(window.rows)
        if len(window.rows) == self._size:
            following = self._take(window.epoch, window.number + 1, position, self._reader.state())
            if following.rows:
                return following
        self._rest = self._kept(self._reader.rows(None))
        following = self._take(window.epoch + 1, 0, position, None)
        if not following.rows:  # the data went away while it was being read
            raise self._empty()
        return following

    def _take(self, epoch: int, number: int, position: int, state: dict[str, Any] | None) -> Window:
        return Window(epoch, number, position, state, list(islice(self._rest, self._size)))

    def _kept(self, rows: Iterator[Named]) -> Iterator[Named]:
        for named_row in rows:
            if all(matches(named_row[1].get(column), wanted) for column, wanted in self._filter.items()):
                yield named_row

    def _empty(self) -> UserError:
        kept = f" that where {self._filter!r} keeps" if self._filter else ""
        return UserError(f"source {self.name} ({self.path}) has no rows{kept}")
