"""Keeps the decoded arrays of a column, in memory or on disk, so that small data is decoded only once."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from openimp.common.cache import cached, stable_hash
from openimp.common.modality import BadMedia, Modality
from openimp.common.protocols import learned_files
from openimp.data.tables import Table

LAYOUT = 3
"""Version of the file format. Files of another version are not read but written again."""
SCHEMA = pa.schema(
    [("data", pa.large_binary()), ("shape", pa.list_(pa.int64())), ("dtype", pa.string()), ("error", pa.string())]
)
"""Columns of a store. A row that could be decoded has the first three, another row only `error`."""
ALIGN = 8
"""The bytes of each array are padded to a multiple, so that the next array is aligned."""
ROWS = "rows.arrow"
CHUNK = 256
"""Number of rows that are read and decoded together."""

Decoded = np.ndarray | BadMedia
"""What a row was decoded to: an array, or the reason why it cannot be read."""
Progress = Callable[[Iterable[Any], str], Iterable[Any]]
"""Wraps an iterable to show progress: `progress(iterable, description)`."""


class DecodedStore:
    """The decoded arrays of a table's column: `store[row]`, read-only.

    They are an Arrow table, which processes share: forked workers inherit it, and a file is memory-mapped. A store on
    disk pickles only its path.
    """

    def __init__(self, rows: pa.Table, file: Path | None = None) -> None:
        """`rows` has the columns of `SCHEMA`, and `file` is where it is on disk."""
        self._rows = rows
        self._file = file

    def __getitem__(self, row: int) -> np.ndarray:
        """The decoded array of a row, or BadMedia as when it was decoded."""
        data, shape, dtype, error = (column[row] for column in self._rows.columns)
        if error.is_valid:
            raise BadMedia(error.as_py())
        array = np.ndarray(shape.as_py(), dtype.as_py(), data.as_buffer())
        array.flags.writeable = False
        return array

    def __reduce__(self) -> tuple[Any, ...]:
        if self._file is None:
            return DecodedStore, (self._rows,)
        return _read, (self._file,)

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
        decoded = _decode(table, modality, column, views, progress)
        if cache == "memory":
            return cls(pa.Table.from_batches(_batches(decoded), SCHEMA))
        key = _key(table, modality, column, views)
        return cached("decoded", key, lambda folder: _read(folder / ROWS), lambda folder: _write(folder, decoded))


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
    progress_bar: Iterable[int] = row_numbers
    if progress:
        progress_bar = progress(row_numbers, f"decoding {table.name}.{column}")
    with ThreadPoolExecutor() as pool:
        chunks = (table.rows(row_numbers[start : start + CHUNK], [column]) for start in row_numbers[::CHUNK])
        decoded = chain.from_iterable(pool.map(decode, chunk) for chunk in chunks)
        for _, item in zip(progress_bar, decoded):
            yield item


def _batches(decoded: Iterator[Decoded]) -> Iterator[pa.RecordBatch]:
    while chunk := list(islice(decoded, CHUNK)):
        yield pa.RecordBatch.from_pylist([_row(item) for item in chunk], SCHEMA)


def _row(item: Decoded) -> dict[str, Any]:
    if isinstance(item, BadMedia):
        return {"error": str(item)}
    data = item.tobytes()
    return {"data": data + bytes(-len(data) % ALIGN), "shape": item.shape, "dtype": item.dtype.str}


def _write(folder: Path, decoded: Iterator[Decoded]) -> None:
    with pa.ipc.new_file(folder / ROWS, SCHEMA) as writer:
        for batch in _batches(decoded):
            writer.write_batch(batch)


def _read(file: Path) -> DecodedStore:
    """Opens a store on disk. Raises OSError, ValueError or TypeError if it is damaged."""
    rows = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    if rows.schema != SCHEMA:
        raise ValueError("its columns are not those of a store")
    # Offsets and types become pointers. Arrow checks the offsets here, and NumPy each array's size when it is read.
    rows.validate(full=True)
    for name in filter(None, rows["dtype"].unique().to_pylist()):
        if np.dtype(name).kind not in "biufc":
            raise ValueError(f"the arrays are of type {np.dtype(name)}, which is not a number")
    return DecodedStore(rows, file)


def _key(table: Table, modality: Modality, column: str, views: list[Any]) -> str:
    modality_class = type(modality)
    options = [modality.config.model_dump_json(), sorted({view.model_dump_json() for view in views})]
    if state := learned_files([modality]):  # The size of a wrapped model's pictures is not in a view.
        options.append(sorted(state.items()))
    files = [(path, table.file_state(path)) for path in table.paths(column)]
    code = [LAYOUT, version("openimp"), modality_class.__module__, modality_class.__qualname__]
    return stable_hash([code, table.fingerprint, column, options, files])
