"""Streams: rows that are read forward, for data that does not fit on disk.

A stream has a fixed number L of lanes. The shards are shuffled again for each epoch, and the epochs follow each other,
so the shards form an endless sequence. Lane l reads shards l, l + L, l + 2 L, ... of this sequence, and shuffles its
rows in windows. Row p of the stream is row p // L of lane p % L.

So what a step sees depends only on the seed, the step and the number of lanes. Each worker of each rank reads only the
lanes of its own part of the batches. If the ranks do not divide the lanes, several ranks read the same lane. MosaicML's
streaming has the same idea (canonical nodes).
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from openimp.common.errors import UserError
from openimp.data.order import permute, seed_key
from openimp.data.tables import Rows, matches
from openimp.recipe.tasks import Source

NamedRow = tuple[str, dict[str, Any]]
"""A row's name, by which a person can find it, and the row."""
Cursor = dict[str, Any]
"""Where a window of a lane begins: the `position` of its first row in the lane, the `epoch`, the number of its shard in
the epoch's order (`shard`), and the `state` in that shard, which is None at its beginning."""
MAX_PASSES_WITHOUT_ROWS = 20
"""A stream counts as empty after a lane has read this many times the number of shards without a row that is kept."""


class Shards(Protocol):
    """The shards of a stream, each of which is read forward."""

    columns: list[str]

    def __len__(self) -> int: ...

    def rows(self, shard: int, state: Any) -> Iterator[tuple[NamedRow, Any]]:
        """The rows of a shard after a state (None: all of them), each with the state after it.

        A state is plain data for JSON.
        """


class Window(NamedTuple):
    """Consecutive rows of a lane."""

    cursor: Cursor
    rows: list[NamedRow]

    @property
    def start(self) -> int:
        """The position of the first row in the lane."""
        return int(self.cursor["position"])

    @property
    def stop(self) -> int:
        return self.start + len(self.rows)


class Stream(Rows):
    """An endless sequence of rows, of which the windows that a step reads are in memory.

    A pickled copy, as a worker gets it, resumes from the cursors that were loaded last. `source` has the options of the
    recipe, and `seed` determines the order of the rows.
    """

    def __init__(
        self,
        name: str,
        path: str,
        shards: Shards,
        root: Path | None,
        content: Callable[[], str],
        *,
        source: Source,
        seed: int,
    ) -> None:
        super().__init__(name, path, shards.columns, root, content)
        self.require(source.where, f"sources.{name}.where")
        self.lanes = lane_count(source.lanes, len(shards))
        self._shards = shards
        self._window_size = -(-source.window // self.lanes)
        self._filter = source.where
        self._seed = seed
        self._start_cursors = [self._beginning(lane) for lane in range(self.lanes)]
        self._readers: dict[int, Lane] = {}
        if next(self.epoch(), None) is None:
            raise self._empty()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}

    def read(self, start: int, positions: Sequence[int], columns: Sequence[str] | None = None) -> list[NamedRow]:
        """The rows at these positions of the stream, in their order, with the given columns or all, and their names.

        `start` is a multiple of the number of lanes, and no position is below it. Rows before `start` are forgotten: a
        later call with a smaller `start` begins again at the last loaded cursor, or at the beginning. Skipping ahead
        reads the rows in between.
        """
        columns = self.columns if columns is None else columns
        lane_start = start // self.lanes
        named_rows = []
        for position in positions:
            lane_position, lane = divmod(position, self.lanes)
            name, row = self._reader(lane, lane_start).row(lane_start, lane_position)
            named_rows.append((name, {column: row.get(column) for column in columns}))
        return named_rows

    def epoch(self) -> Iterator[NamedRow]:
        """The rows of the first epoch, shard by shard, without shuffling them in windows."""
        for shard in range(len(self._shards)):
            for named_row, _ in self._rows(0, shard, None):
                yield named_row

    def cursors(self) -> dict[str, Cursor]:
        """The cursor of each lane that was read, of the window with the last `start` of `read`; plain data for JSON."""
        return {str(lane): reader.cursor() for lane, reader in sorted(self._readers.items())}

    def load_cursors(self, cursors: dict[str, Cursor], changed: bool = False) -> dict[str, Cursor]:
        """Resumes from the cursors of all lanes without reading earlier rows, and returns the cursors that are used.

        If the data has `changed`, all lanes start the next epoch, because the old positions mean nothing in new data.
        There may be another number of lanes then.
        """
        lanes = range(self.lanes)
        if changed:
            epoch = 1 + max(cursor["epoch"] for cursor in cursors.values())
            # About as many rows of the stream as before, in the new number of lanes.
            position = max(cursor["position"] for cursor in cursors.values()) * len(cursors) // self.lanes
            cursors = {str(lane): self._beginning(lane, epoch, position) for lane in lanes}
        if cursors.keys() != set(map(str, lanes)):
            raise UserError(f"source {self.name}: the checkpoint was saved with other lanes; start a new run")
        self._start_cursors = [cursors[str(lane)] for lane in lanes]
        self._readers = {}
        return cursors

    def _beginning(self, lane: int, epoch: int = 0, position: int = 0) -> Cursor:
        """The cursor at a lane's first shard of an epoch."""
        shard = (lane - epoch * len(self._shards)) % self.lanes
        return {"position": position, "epoch": epoch, "shard": shard, "state": None}

    def _reader(self, lane: int, start: int) -> "Lane":
        """The reader of a lane, which has forgotten no row from `start` on."""
        reader = self._readers.get(lane)
        if reader is None or start < reader.cursor()["position"]:
            if start < self._start_cursors[lane]["position"]:
                self._start_cursors[lane] = self._beginning(lane)
            reader = self._readers[lane] = Lane(self._windows(lane, self._start_cursors[lane]))
        return reader

    def _windows(self, lane: int, cursor: Cursor) -> Iterator[Window]:
        """The windows of a lane from a cursor on, without end. No window extends into the next epoch."""
        epoch = cursor["epoch"]
        shard = cursor["shard"]
        state = cursor["state"]
        window = Window(cursor, [])
        shards_without_rows = 0
        while shards_without_rows < MAX_PASSES_WITHOUT_ROWS * len(self._shards):
            shards_without_rows += 1
            for named_row, next_state in self._rows(epoch, shard, state):
                shards_without_rows = 0
                window.rows.append(named_row)
                if len(window.rows) == self._window_size:
                    yield self._shuffled(lane, window)
                    window = Window({"position": window.stop, "epoch": epoch, "shard": shard, "state": next_state}, [])
            state = None
            last_epoch = epoch
            epoch, shard = divmod(epoch * len(self._shards) + shard + self.lanes, len(self._shards))
            epoch_ends = last_epoch != epoch
            if epoch_ends and window.rows:
                yield self._shuffled(lane, window)
            # A window with rows goes on into the next shard of its epoch.
            if epoch_ends or not window.rows:
                window = Window({"position": window.stop, "epoch": epoch, "shard": shard, "state": None}, [])
        raise self._empty()

    def _shuffled(self, lane: int, window: Window) -> Window:
        rng = np.random.default_rng(np.random.SeedSequence([self._seed, lane, window.start]))
        return Window(window.cursor, [window.rows[i] for i in rng.permutation(len(window.rows))])

    def _rows(self, epoch: int, shard: int, state: Any) -> Iterator[tuple[NamedRow, Any]]:
        """The rows that the filter keeps of shard number `shard` in an epoch's order; see `Shards.rows`."""
        order = seed_key(self._seed, "shards", epoch)
        (stored_shard,) = permute(np.array([shard]), len(self._shards), order).tolist()
        for (name, row), next_state in self._shards.rows(stored_shard, state):
            if all(matches(row.get(column), wanted) for column, wanted in self._filter.items()):
                yield (name, row), next_state

    def _empty(self) -> UserError:
        condition = f" that where {self._filter!r} keeps" if self._filter else ""
        return UserError(f"source {self.name} ({self.path}) has no rows{condition}")


class Lane:
    """Reads the windows of a lane forward. It holds the windows from the first row that is still needed on."""

    def __init__(self, windows: Iterator[Window]) -> None:
        self._windows = windows
        self._held = deque([next(windows)])

    def row(self, start: int, position: int) -> NamedRow:
        """A row of the lane. Windows that end before `start`, which is not above `position`, are forgotten."""
        while self._held[-1].stop <= position:
            window = next(self._windows)  # First, because it may raise.
            if self._held[-1].stop <= start:
                self._held.clear()  # Rows that are skipped.
            self._held.append(window)
        while self._held[0].stop <= start:
            self._held.popleft()
        return next(window.rows[position - window.start] for window in self._held if position < window.stop)

    def cursor(self) -> Cursor:
        return self._held[0].cursor


def lane_count(limit: int, shards: int) -> int:
    """The number of lanes: `limit` or, with fewer shards, the largest divisor of `limit` that is at most `shards`."""
    return max(lanes for lanes in range(1, min(limit, shards) + 1) if limit % lanes == 0)
