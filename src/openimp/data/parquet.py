"""Reads Parquet files with Hugging Face `datasets`, and limits their unpacked size.

Dictionary encoding stores a long value once for any number of rows, so a file of a few hundred bytes can unpack to
terabytes. Therefore rows are unpacked in batches that are small enough for the longest value of their row group, and
the bytes of the batches are counted. `datasets` itself would unpack a whole row group before returning its first row.
"""

import glob
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, DatasetInfo, Features
from datasets.arrow_reader import ArrowReader
from datasets.builder import Key
from datasets.config import DATASET_INFO_FILENAME
from datasets.packaged_modules.parquet.parquet import Parquet

from openimp.common.cache import cache_folder, cached, stable_hash
from openimp.common.digests import digests
from openimp.common.errors import UserError, one_line
from openimp.common.names import is_url
from openimp.data.hub import quiet

MAX_EXPANSION = 100
MIN_LIMIT = 2**30
"""A file may unpack to `MAX_EXPANSION` times its size, or to `MIN_LIMIT` bytes if that is more. The minimum is for
columns of equal labels, which take almost no space in a file."""
BATCH_ROWS = 10_000
"""Maximum number of rows in a batch."""
BATCH_BYTES = 2**26
"""Bytes of a batch if its rows are as long as the average row of the row group."""
WORST_BATCH_BYTES = 2**27
"""Maximum number of bytes in a batch, whatever its rows hold, except lists that repeat a value."""
BUFFER = 2**16
"""Bytes that are read at once to see the beginning of a column chunk."""
MAX_MERGED = 1000
"""Maximum number of batches that are merged into one table."""
MERGED_BYTES = 2**24
"""Batches that have this many bytes together become one table. Many small tables would waste memory."""


def count_rows(name: str, file: str) -> int:
    """The number of rows of a file on disk."""
    try:
        return pq.read_metadata(file).num_rows
    except pa.ArrowException as error:
        raise UserError(f"source {name}: {file} is not a readable Parquet file: {one_line(error)}") from None


def load(name: str, path: str, files: list[str], streaming: bool) -> Any:
    """Opens files as a `datasets.Dataset`, unpacked once into the cache; if `streaming`, as an `IterableDataset`."""
    # `datasets` expands patterns: a file that is named `*.parquet` would include all other files in its folder.
    names = [file if is_url(file) else glob.escape(file) for file in files]
    for file in files:
        if "::" in file and not is_url(file):
            raise UserError(f"source {name}: `datasets` would read {file} as a chain of URLs; rename it")

    with quiet(name, path):
        # `load_dataset` would report each call to a server and wait for it, even for local files.
        builder = partial(BoundedParquet, data_files={"train": names}, features=_common_features(files))
        if streaming:
            return builder(str(cache_folder("parquet"))).as_streaming_dataset(split="train")
        state = stable_hash(digests(files))

        def read(folder: Path) -> Any:
            if (folder / "state").read_text() != state:
                raise ValueError("the files have changed")
            return _unpacked(folder)

        def write(folder: Path) -> None:
            builder(str(folder)).download_and_prepare()
            (folder / "state").write_text(state)

        return cached("parquet", stable_hash(files), read, write)


def _unpacked(folder: Path) -> Dataset:
    """What `BoundedParquet` has written. The builder would do the same, but locks files, also in a read-only cache."""
    (info_file,) = folder.rglob(DATASET_INFO_FILENAME)
    info = DatasetInfo.from_directory(str(info_file.parent))
    reader = ArrowReader(str(info_file.parent), info)
    return Dataset(**reader.read(info.dataset_name, "train", info.splits.values()))


def _common_features(files: list[str]) -> Any:
    """The columns of local files that differ: a file may lack a column, or have no value in it. None if all are equal.

    `datasets` would expect the columns and types of the first file.
    """
    if len(files) == 1 or is_url(files[0]):
        return None
    schemas = [pq.read_schema(file) for file in files]
    if all(schema.equals(schemas[0]) for schema in schemas):
        return None
    return Features.from_arrow_schema(pa.unify_schemas(schemas, promote_options="permissive"))


class BoundedParquet(Parquet):
    """The Parquet reader of `datasets`, which raises an error if a file unpacks to more than the limit."""

    def _generate_tables(self, files: list[str], row_groups_list: list[Any]) -> Iterator[tuple[Key, pa.Table]]:
        for i, (file, groups) in enumerate(zip(files, row_groups_list)):
            try:
                with open(file, "rb") as handle:  # `datasets` replaces `open` with a version that reads URLs.
                    for j, table in enumerate(_tables(handle, groups)):
                        yield Key(i, j), self._cast_table(table)
            except (pa.ArrowException, OSError, ValueError) as error:  # They do not name the file.
                raise ValueError(f"{os.path.basename(file)}: {one_line(error)}") from None


def _tables(handle: Any, row_groups: Iterable[int] | None) -> Iterator[pa.Table]:
    limit = max(MIN_LIMIT, MAX_EXPANSION * handle.seek(0, os.SEEK_END))
    unpacked_bytes = 0
    merged = []
    merged_bytes = 0
    for batch in _batches(handle, row_groups):
        unpacked_bytes += batch.nbytes
        if unpacked_bytes > limit:
            raise ValueError(
                f"unpacks to more than {limit:,} bytes, the limit for its size; if you trust the file, split it into "
                "smaller ones"
            )
        merged.append(batch)
        merged_bytes += batch.nbytes
        if len(merged) == MAX_MERGED or merged_bytes >= MERGED_BYTES:
            yield pa.Table.from_batches(merged)
            merged = []
            merged_bytes = 0
    if merged:
        yield pa.Table.from_batches(merged)


def _batches(handle: Any, row_groups: Iterable[int] | None) -> Iterator[pa.RecordBatch]:
    """The rows of some row groups or of all, in batches of at most `WORST_BATCH_BYTES`."""
    parquet = pq.ParquetFile(handle)
    columns = [parquet.schema.column(i) for i in range(len(parquet.schema))]
    texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    # With `buffer_size`, only the pages at the beginning of a column chunk are read; the first is the dictionary.
    beginnings = pq.ParquetFile(handle, metadata=parquet.metadata, read_dictionary=texts, buffer_size=BUFFER)
    for number in range(parquet.num_row_groups) if row_groups is None else row_groups:
        group = parquet.metadata.row_group(number)
        chunks = [group.column(i) for i in range(group.num_columns)]
        group_bytes = sum(chunk.total_uncompressed_size for chunk in chunks)
        average_row = group_bytes // max(1, group.num_rows)
        rows = min(BATCH_ROWS, BATCH_BYTES // max(1, average_row))
        # No value is longer than its column chunk. The longest value is determined only if that bound is too large.
        if min(rows, group.num_rows) * group_bytes > WORST_BATCH_BYTES:
            longest_row = average_row + _longest_values(beginnings, number, columns, chunks)
            rows = min(rows, WORST_BATCH_BYTES // max(1, longest_row))
        yield from parquet.iter_batches(max(1, rows), [number])


def _longest_values(beginnings: Any, group: int, columns: list[Any], chunks: list[Any]) -> int:
    """The sum over the columns of the bytes of the longest value that a row group can repeat without storing it
    again."""
    total = 0
    with_dictionary = []
    for column, chunk in zip(columns, chunks):
        if "DELTA_BYTE_ARRAY" in chunk.encodings:  # A value can repeat a part of the value before it.
            total += chunk.total_uncompressed_size
        elif column.physical_type != "BYTE_ARRAY":
            # Numbers have up to 12 bytes (INT96), texts of fixed length `length`; runs of equal ones are stored once.
            total += max(12, column.length)
        elif chunk.has_dictionary_page:
            with_dictionary.append(column.path)
    if with_dictionary:
        first_row = next(beginnings.iter_batches(1, [group], columns=with_dictionary))
        total += sum(map(_longest_dictionary_value, first_row.columns))
    return total


def _longest_dictionary_value(array: pa.Array) -> int:
    if pa.types.is_dictionary(array.type):
        return pc.max(pc.binary_length(array.dictionary)).as_py() or 0
    if pa.types.is_struct(array.type):
        return max(map(_longest_dictionary_value, array.flatten()), default=0)
    return _longest_dictionary_value(array.flatten())  # of a list
