"""Embeddings in parts: a folder, on disk or in an object store, that several processes fill.

`files.parquet` lists the files, with one row group per part. `vectors/` and `errors/` have one Parquet file per part.
A part is done when its file in `vectors/` exists. A file appears completely or not at all, and writing a part again
replaces its files by equal ones. So whatever fails, no file is embedded in two rows.
"""

import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from openimp.common.errors import UserError
from openimp.common.safe_files import replacing
from openimp.data.files import is_url
from openimp.inference.files import File

FILES, VECTORS, ERRORS = "files.parquet", "vectors", "errors"
MOST_FILES = 8192
"""Most files per part, except that a part has at least one batch. Vectors of 512 values are then 16 MB."""
PARTS_PER_WORKER = 8
"""Parts per worker, if there are not too many files. With several, workers finish at about the same time."""
# Names on disk are bytes, which need not be UTF-8.
FILES_SCHEMA = pa.schema({"path": pa.binary(), "modality": pa.string(), "towards": pa.string()})
ERRORS_SCHEMA = pa.schema(dict.fromkeys(("path", "modality", "error"), pa.string()))


class Parts:
    """The folder. One process calls `prepare`; then any number of them read, embed and write parts."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._system, self._root = LocalFileSystem(), os.path.abspath(folder)
        if is_url(folder):
            self._system, self._root = fsspec.core.url_to_fs(folder)

    def prepare(
        self, found: Mapping[str, Sequence[File]], towards: Mapping[str, str], options: str, batch: int, workers: int
    ) -> None:
        """Divides files, given by modality, into parts, unless an earlier call has divided the same files.

        A part has files of one modality. Its first file is the first one of a batch of `batch` files, so the batches
        are those of one process. An earlier call must have had the same `options`.
        """
        schema = FILES_SCHEMA.with_metadata({"options": options})
        tables = []
        for name, files in found.items():
            same = [[text] * len(files) for text in (name, towards[name])]
            tables.append(pa.table([[os.fsencode(file) for file in files], *same], schema=schema))
        if self._system.exists(self._path(FILES)):
            if self.options != options or not self._list.read().equals(pa.concat_tables(tables)):
                raise UserError(
                    f"{self.folder}: was begun with other files, another model or other options; name another folder"
                )
            return
        if self._system.exists(self._root) and (not self._system.isdir(self._root) or self._system.ls(self._root)):
            raise UserError(f"{self.folder}: expected a new or empty folder, or one that openimp embed --ray wrote")
        content = io.BytesIO()
        with pq.ParquetWriter(content, schema) as writer:
            for table in tables:
                batches = min(-(-len(table) // (batch * workers * PARTS_PER_WORKER)), MOST_FILES // batch)
                writer.write_table(table, row_group_size=batch * max(1, batches))
        self._write(FILES, content)

    def missing(self) -> list[int]:
        """The numbers of the parts that are not done."""
        self._system.invalidate_cache()
        done = {os.path.basename(path) for path in self._system.find(self._path(VECTORS))}
        return [number for number in range(self._list.num_row_groups) if _name(number) not in done]

    def files(self, number: int) -> tuple[str, str, list[File]]:
        """The modality of a part, the modality to compare it with, and its files."""
        table = self._list.read_row_group(number)
        paths = [os.fsdecode(path) for path in table["path"].to_pylist()]
        name, towards = (table[column][0].as_py() for column in ("modality", "towards"))
        return name, towards, [path if is_url(path) else Path(path) for path in paths]

    def write(self, number: int, vectors: pa.Table, errors: pa.Table) -> None:
        """Writes a part: rows of the table of embeddings, and paths of unreadable files with the reasons."""
        for folder, table in ((ERRORS, errors), (VECTORS, vectors)):
            content = io.BytesIO()
            pq.write_table(table, content)
            self._write(f"{folder}/{_name(number)}", content)

    def count(self) -> tuple[dict[str, int], list[str]]:
        """The number of embedded files by modality, and "path: reason" of each unreadable one, when all parts are
        done."""
        counts = self._list.read(["modality"])["modality"].value_counts().to_pylist()
        errors = pq.read_table(self._path(ERRORS), filesystem=self._system).to_pylist()
        bad = Counter(error["modality"] for error in errors)
        rows = {count["values"]: count["counts"] - bad[count["values"]] for count in counts}
        return rows, [f"{error['path']}: {error['error']}" for error in errors]

    @property
    def options(self) -> str:
        """The `options` of the call that divided the files."""
        return (self._list.schema_arrow.metadata or {}).get(b"options", b"").decode()

    @cached_property
    def _list(self) -> pq.ParquetFile:
        return pq.ParquetFile(self._system.open(self._path(FILES), "rb"))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _write(self, name: str, content: io.BytesIO) -> None:
        """Writes a file in one go. Object stores do so by themselves."""
        path = self._path(name)
        self._system.makedirs(os.path.dirname(path), exist_ok=True)
        if isinstance(self._system, LocalFileSystem):
            with replacing(Path(path)) as file:
                file.write(content.getbuffer())
        else:
            self._system.pipe_file(path, content.getvalue())


def _name(number: int) -> str:
    return f"{number:08}.parquet"
