"""Parquet files through Hugging Face `datasets`, within limits: a few hundred bytes of one can stand for terabytes.

A dictionary stores a long value once and repeats it in as many rows as the file likes, so what a file unpacks to is
counted while it is unpacked. `datasets` itself would unpack all of a row group before the first row can be seen.
"""

import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets.builder import Key
from datasets.packaged_modules.parquet.parquet import Parquet

EXPANSION, SMALL = 100, 2**26
"""A file may unpack to so many times its size, or to so many bytes if that is more."""
BATCH_ROWS, BATCH_BYTES = 1000, 2**26
"""Rows that are unpacked at once at most, and fewer if the values of a row group are long."""
MOST_BATCHES, PART_BYTES = 1000, 2**24
"""What is handed on at once, so that rows that are unpacked one by one do not lie in a piece of memory each."""


def open_files(files: list[str], cache: str, streaming: bool) -> Any:
    """The rows of some files as a `datasets.Dataset`, which is unpacked once under `cache`, or as an `IterableDataset`.

    Raises:
        Exception: a file cannot be read, or unpacks to too much.
    """
    builder = BoundedParquet(cache_dir=cache, data_files={"train": files})
    if streaming:
        return builder.as_streaming_dataset(split="train")
    builder.download_and_prepare()
    return builder.as_dataset(split="train")


class BoundedParquet(Parquet):
    """The Parquet reader of `datasets`, except that it stops at a file that unpacks to far more bytes than it has."""

    def _generate_tables(self, files: list[str], row_groups_list: list[Any]) -> Iterator[tuple[Key, pa.Table]]:
        for i, (file, groups) in enumerate(zip(files, row_groups_list)):
            with open(file, "rb") as handle:  # `datasets` replaces `open` by its own, which knows URLs.
                for j, table in enumerate(_tables(file, handle, groups)):
                    yield Key(i, j), self._cast_table(table)


def _tables(file: str, handle: Any, groups: Any) -> Iterator[pa.Table]:
    size = handle.seek(0, os.SEEK_END)
    limit, unpacked, handed_on = max(SMALL, EXPANSION * size), 0, 0
    parquet = pq.ParquetFile(handle)
    waiting: list[pa.RecordBatch] = []
    for batch in parquet.iter_batches(_rows_at_once(parquet.metadata), groups and [*groups]):
        unpacked += batch.nbytes
        if unpacked > limit:
            raise ValueError(f"{size:,} bytes unpack to more than {limit:,}, the most that is unpacked of such a file")
        waiting.append(batch)
        if len(waiting) == MOST_BATCHES or unpacked - handed_on >= PART_BYTES:
            yield pa.Table.from_batches(waiting)
            waiting, handed_on = [], unpacked
    if waiting:
        yield pa.Table.from_batches(waiting)


def _rows_at_once(metadata: Any) -> int:
    """As many rows as surely fit into `BATCH_BYTES`, were each value as long as all of its row group is unpacked."""
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    sizes = (sum(group.column(i).total_uncompressed_size for i in range(group.num_columns)) for group in groups)
    return min(BATCH_ROWS, max(1, BATCH_BYTES // max(1, max(sizes, default=1))))
