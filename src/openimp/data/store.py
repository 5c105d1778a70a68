"""Keeps decoded arrays in memory or on disk, so that they are decoded only once.

On disk, they are in openimp's cache, in files of `ITEMS_PER_FILE` items. If decoding is stopped, the next run goes on.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from openimp.common.cache import cached, is_cached, stable_hash
from openimp.common.modality import BadMedia, Modality
from openimp.common.progress import Progress
from openimp.common.protocols import Towered, learned_files
from openimp.common.threads import core_count, map_ahead
from openimp.data.tables import Table

LAYOUT = 3
"""Version of the file format. Files of another version are not read but written again."""
SCHEMA = pa.schema(
    [("data", pa.large_binary()), ("shape", pa.list_(pa.int64())), ("dtype", pa.string()), ("error", pa.string())]
)
"""Columns of a store. A row that could be decoded has the first three, another row only `error`."""
ALIGN = 8
"""The bytes of each array are padded to a multiple of this number, so that the next array is aligned."""
KIND = "decoded"
"""Folder in openimp's cache."""
ROWS_FILE = "rows.arrow"
ITEMS_PER_FILE = 4096
"""Items per file. After a stop, at most this many items are decoded again."""
CHUNK = 256
"""Maximum number of arrays that are written together."""
BATCH_BYTES = 2**26
"""Once arrays have this many bytes together, they are written, even if they are fewer than `CHUNK`."""

MAX_THREADS = 16
"""Maximum number of threads that decode. About twice as many items are in memory."""
Decoded = np.ndarray | BadMedia
"""What an item was decoded to: an array, or the reason why it cannot be read."""


class DecodedStore:
    """Decoded arrays, of a table's column or of other items: `store[row]`, read-only.

    They are an Arrow table, which processes share: forked workers inherit it, and a file is memory-mapped. A store on
    disk pickles only its path.
    """

    def __init__(self, rows: pa.Table, files: Sequence[Path] = ()) -> None:
        """`rows` has the columns of `SCHEMA`. If it is on disk, `files` have its parts, in order."""
        self._rows = rows
        self._files = files

    def __getitem__(self, row: int) -> np.ndarray:
        """The decoded array of a row, or BadMedia as when it was decoded."""
        data, shape, dtype, error = (column[row] for column in self._rows.columns)
        if error.is_valid:
            raise BadMedia(error.as_py())
        array = np.ndarray(shape.as_py(), dtype.as_py(), data.as_buffer())
        array.flags.writeable = False
        return array

    def __reduce__(self) -> tuple[Any, ...]:
        return (read_store, tuple(self._files)) if self._files else (DecodedStore, (self._rows,))


@dataclass(frozen=True)
class SharedStore:
    """A store for a column in which several rows have the same media: `store[row]`."""

    store: DecodedStore
    number_of_row: np.ndarray  # for each row, the number of its media in `store`

    def __getitem__(self, row: int) -> np.ndarray:
        """The decoded array of a row, or BadMedia as when it was decoded."""
        return self.store[int(self.number_of_row[row])]


def store_column(
    table: Table,
    modality: Modality,
    column: str,
    views: list[Any],
    on_disk: bool = False,
    progress: Progress | None = None,
) -> DecodedStore | SharedStore:
    """Decodes the media in a table's column. A tower embeds them, and its vectors are always kept on disk.

    A file that several rows name, with a caption each, is decoded once. `views` are all views that read the column:
    arrays are no larger than the largest of them needs.
    """
    is_tower = isinstance(modality, Towered)
    paths = table.path_of_rows(column)
    rows, number_of_row = _rows_with_distinct_media(paths)

    def decode(items: range) -> Iterator[Decoded]:
        cells_of_rows = table.iterate([column], rows[items.start : items.stop])
        reads = (partial(table.media, cells[column]) for cells in cells_of_rows)
        if isinstance(modality, Towered):
            return modality.embed_all(reads)
        # In threads, because decoders release Python's global lock.
        return map_ahead(partial(_decode, modality, views), reads, threads=min(MAX_THREADS, core_count()))

    description = f"{'embedding' if is_tower else 'decoding'} {table.name}.{column}"
    if on_disk or is_tower:
        states = [_content_state(table, column, row, paths[row]) for row in rows]
        store = store_on_disk(decoding_key(modality, views), states, decode, description, progress)
    else:
        items = range(len(rows))
        progress_bar = progress(items, description) if progress else items
        decoded = (array for _, array in zip(progress_bar, decode(items)))
        store = DecodedStore(pa.Table.from_batches(_batches(decoded), SCHEMA))
    return store if number_of_row is None else SharedStore(store, np.array(number_of_row))


def _rows_with_distinct_media(paths: list[str | None]) -> tuple[Sequence[int], list[int] | None]:
    """One row for each file or, if the table itself holds the media, each row; and the number of each row's media.

    `paths` has the file of each row. The numbers are None if no file is named twice.
    """
    if len({*paths}) == len(paths) or not any(paths):
        return range(len(paths)), None
    first_rows: dict[str | int, int] = {}  # by path, or by row if the table itself holds the media
    for row, path in enumerate(paths):
        first_rows.setdefault(path or row, row)
    numbers = {path: number for number, path in enumerate(first_rows)}
    return list(first_rows.values()), [numbers[path or row] for row, path in enumerate(paths)]


def _decode(modality: Modality, views: list[Any], read: Callable[[], Any]) -> Decoded:
    try:
        return modality.decode(read(), views)
    except BadMedia as error:
        return error


def store_on_disk(
    decoding: list[Any],
    states: list[Any],
    decode: Callable[[range], Iterator[Decoded]],
    description: str,
    progress: Progress | None,
) -> DecodedStore:
    """Decodes items, except those that an earlier run has decoded.

    Of several processes that need the same items, one decodes them and the others wait.

    Args:
        decoding: what determines how an item is decoded, besides its state.
        states: a value for each item that changes with it.
        decode: yields what the items in a range of their numbers are decoded to.
        description: what is shown with the progress.
    """
    items = range(len(states))
    parts = [items[start : start + ITEMS_PER_FILE] for start in items[::ITEMS_PER_FILE]]
    key_of = {part: stable_hash([*decoding, *states[part.start : part.stop]]) for part in parts}
    missing = sum(len(part) for part, key in key_of.items() if not is_cached(KIND, key))
    ticks = iter(progress(range(missing), description) if progress and missing else range(missing))

    def write(folder: Path, part: range) -> None:
        # One tick per item. `repeat`, because a damaged file is written again without ticks.
        write_store(folder, (array for array, _ in zip(decode(part), chain(ticks, repeat(None)))))

    files = [cached(KIND, key, _checked_file, partial(write, part=part)) for part, key in key_of.items()]
    for _ in ticks:  # Another process may have decoded the others.
        pass
    return read_store(*files)


def _checked_file(folder: Path) -> Path:
    read_part(folder / ROWS_FILE)
    return folder / ROWS_FILE


def _batches(decoded: Iterable[Decoded]) -> Iterator[pa.RecordBatch]:
    """The rows of arrays, in batches of at most `CHUNK` arrays and about `BATCH_BYTES`: a clip may have 40 MB."""
    batch: list[dict[str, Any]] = []
    batch_bytes = 0
    for item in decoded:
        if isinstance(item, BadMedia):
            batch.append({"error": str(item)})
        else:
            data = item.tobytes() + bytes(-item.nbytes % ALIGN)
            batch.append({"data": data, "shape": item.shape, "dtype": item.dtype.str})
            batch_bytes += len(data)
        if len(batch) == CHUNK or batch_bytes >= BATCH_BYTES:
            yield pa.RecordBatch.from_pylist(batch, SCHEMA)
            batch = []
            batch_bytes = 0
    if batch:
        yield pa.RecordBatch.from_pylist(batch, SCHEMA)


def write_store(folder: Path, decoded: Iterator[Decoded]) -> None:
    """Writes a part of a store to an empty folder."""
    with pa.ipc.new_file(folder / ROWS_FILE, SCHEMA) as writer:
        for batch in _batches(decoded):
            writer.write_batch(batch)


def read_store(*files: Path) -> DecodedStore:
    """Opens a store on disk, from the files of its parts."""
    rows = pa.concat_tables(map(read_part, files)) if files else SCHEMA.empty_table()
    return DecodedStore(rows, files)


def read_part(file: Path) -> pa.Table:
    """Opens a file of a store. Raises OSError or ValueError if it is damaged."""
    rows = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    rows.validate(full=True)  # Otherwise, damaged offsets would make NumPy read other memory.
    return rows


def decoding_key(modality: Modality, views: list[Any]) -> list[Any]:
    """What determines how a column is decoded, besides its rows: the modality, and the views that read the column."""
    return [*decoding_of(modality), sorted({view.model_dump_json() for view in views})]


def decoding_of(modality: Any) -> list[Any]:
    """What decides on how a modality decodes: its code, its options, and what it learned."""
    modality_class = type(modality)
    code = [LAYOUT, version("openimp"), modality_class.__module__, modality_class.__qualname__]
    return [*code, modality.config.model_dump_json(), sorted(learned_files([modality]).items())]


def _content_state(table: Table, column: str, row: int, path: str | None) -> Any:
    """A value that changes if the media in a row change. `path`: of their file.

    If there is a path, the row's other columns do not count, so that a corrected caption does not decode the media
    again.
    """
    return (path, table.file_digest(path)) if path else (table.fingerprint, column, row)
