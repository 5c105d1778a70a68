"""Keeps the decoded arrays of a column, in memory or on disk, so that small data is decoded only once."""

from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from openimp.common.cache import cached, stable_hash
from openimp.common.modality import BadMedia, Modality
from openimp.common.progress import Progress
from openimp.common.protocols import learned_files
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
ROWS_FILE = "rows.arrow"
CHUNK = 256
"""Maximum number of arrays that are written together."""
BATCH_BYTES = 2**26
"""Bytes of arrays from which on they are written, although they are fewer than `CHUNK`."""

MAX_THREADS = 16
"""Maximum number of threads that decode. About twice as many items are in memory."""
Decoded = np.ndarray | BadMedia
"""What a row was decoded to: an array, or the reason why it cannot be read."""


class DecodedStore:
    """The decoded arrays of a table's column: `store[row]`, read-only.

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

    @classmethod
    def build(
        cls,
        table: Table,
        modality: Modality,
        column: str,
        views: list[Any],
        cache: Literal["memory", "disk"] = "memory",
        progress: Progress | None = None,
    ) -> "DecodedStore":
        """Decodes a column, or opens the store on disk of an earlier run.

        A store on disk is found by a hash of the data, the modality's options, the views and the version of openimp. Of
        several processes that need the same store, one writes it and the others wait.

        `views` are all views that read the column: arrays are no larger than the largest of them needs.
        """
        decoded = _decode(table, modality, column, views, progress)  # A generator: nothing is decoded yet.
        if cache == "memory":
            return cls(pa.Table.from_batches(_batches(decoded), SCHEMA))
        key = stable_hash([*decoding_key(modality, views), *row_states(table, column)])
        return cached(
            "decoded", key, lambda folder: read_store(folder / ROWS_FILE), lambda folder: write_store(folder, decoded)
        )


def _decode(
    table: Table, modality: Modality, column: str, views: list[Any], progress: Progress | None
) -> Iterator[Decoded]:
    """Each row's array or error, in order. Threads decode, because decoders release Python's global lock."""

    def decode(row: dict[str, Any]) -> Decoded:
        try:
            return modality.decode(table.media(row[column]), views)
        except BadMedia as error:
            return error

    row_numbers = range(len(table))
    progress_bar = progress(row_numbers, f"decoding {table.name}.{column}") if progress else row_numbers
    rows = chain.from_iterable(table.chunks(row_numbers, [column]))
    for _, item in zip(progress_bar, map_ahead(decode, rows, threads=min(MAX_THREADS, core_count()))):
        yield item


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
    """Writes a store, or a part of one, to an empty folder."""
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


def row_states(table: Table, column: str) -> list[Any]:
    """For each row, a value that changes if the row's media change.

    If a row has a path, its other columns do not count, so that a corrected caption does not decode the media again.
    """
    paths = table.path_of_rows(column)
    state_of = {path: table.file_digest(path) for path in paths if path}
    return [(path, state_of[path]) if path else (table.fingerprint, column, row) for row, path in enumerate(paths)]
