"""Reads Parquet files with Hugging Face `datasets`, and limits their unpacked size.

Dictionary encoding stores a long value once for any number of rows, so a file of a few hundred bytes can unpack to
terabytes. Therefore rows are unpacked in small batches and their bytes are counted. `datasets` itself would unpack a
whole row group before returning its first row.
"""

import glob
import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets.builder import Key
from datasets.packaged_modules.parquet.parquet import Parquet

from openimp.data.files import is_url

MAX_EXPANSION, MIN_LIMIT = 100, 2**30
"""A file may unpack to `MAX_EXPANSION` times its size, or to `MIN_LIMIT` bytes if that is more. The minimum is for
columns of equal labels, which take almost no space in a file."""
BATCH_ROWS, BATCH_BYTES = 1000, 2**26
"""Most rows that are unpacked at once. If values are long, fewer rows, so that they fit into `BATCH_BYTES`."""
MAX_MERGED, MERGED_BYTES = 1000, 2**24
"""Batches are merged into tables of `MAX_MERGED` batches or about `MERGED_BYTES` bytes, because many small tables would
waste memory."""


def open_files(files: list[str], cache: str, streaming: bool) -> Any:
    """Opens files as a `datasets.Dataset`, unpacked into `cache` once, or with `streaming` as an `IterableDataset`."""
    local = [file for file in files if not is_url(file)]
    if nested := [file for file in local if "::" in file]:
        raise ValueError(f"`datasets` would read {nested[0]} as a chain of URLs; rename it")
    # `datasets` expands patterns: a file that is named `*.parquet` would include all other files in its folder.
    names = [glob.escape(file) if file in local else file for file in files]
    builder = BoundedParquet(cache_dir=cache, data_files={"train": names})
    if streaming:
        return builder.as_streaming_dataset(split="train")
    builder.download_and_prepare()
    return builder.as_dataset(split="train")


class BoundedParquet(Parquet):
    """The Parquet reader of `datasets`, which raises an error if a file unpacks to more than the limit."""

    def _generate_tables(self, files: list[str], row_groups_list: list[Any]) -> Iterator[tuple[Key, pa.Table]]:
        for i, (file, groups) in enumerate(zip(files, row_groups_list)):
            with open(file, "rb") as handle:  # `datasets` replaces `open` with a version that reads URLs.
                for j, table in enumerate(_tables(file, handle, groups)):
                    yield Key(i, j), self._cast_table(table)


def _tables(file: str, handle: Any, groups: Any) -> Iterator[pa.Table]:
    size = handle.seek(0, os.SEEK_END)
    limit, unpacked, handed_on = max(MIN_LIMIT, MAX_EXPANSION * size), 0, 0
    parquet = pq.ParquetFile(handle)
    waiting: list[pa.RecordBatch] = []
    for batch in parquet.iter_batches(_rows_at_once(parquet.metadata), groups and [*groups]):
        unpacked += batch.nbytes
        if unpacked > limit:
            raise ValueError(
                f"{os.path.basename(file)} has {size:,} bytes and unpacks to more than {limit:,}, the limit for its "
                "size; if you trust the file, split it into smaller ones"
            )
        waiting.append(batch)
        if len(waiting) == MAX_MERGED or unpacked - handed_on >= MERGED_BYTES:
            yield pa.Table.from_batches(waiting)
            waiting, handed_on = [], unpacked
    if waiting:
        yield pa.Table.from_batches(waiting)


def _rows_at_once(metadata: Any) -> int:
    """Number of rows that fit into `BATCH_BYTES` even if each row is as long as the largest row group unpacked."""
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    sizes = (sum(group.column(i).total_uncompressed_size for i in range(group.num_columns)) for group in groups)
    return min(BATCH_ROWS, max(1, BATCH_BYTES // max(1, max(sizes, default=1))))
