"""Local tars as a table. An index tells where the members are, and the tars are read on demand.

To find the members, every header must be read, which takes long for many large tars. So the index of each tar is kept
in the cache folder, under a hash of the tar's path, size and time of change. It is an Arrow stream after its own hash,
and nothing in it is unpickled. An index that is damaged, or that leads out of the tar, is made again.
"""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from openimp.common.errors import UserError
from openimp.common.safe_files import cache_folder, replacing
from openimp.data.files import fingerprint, open_forward, stable_hash
from openimp.data.tables import Table, Unreadable, UnreadableRest
from openimp.data.tars import MAX_BYTES, examples, flatten, parse

MAX_EXTENSIONS = 256
"""Most extensions in a table. An extension is everything after a name's first dot, and each is a column as long as the
table. Without a limit, each member of a tar with a1.v1.jpg, a2.v2.jpg, ... would have its own column."""
LAYOUT = 1
"""Version of the index. Indexes of another version are not read."""
SCHEMA = pa.schema(
    [
        pa.field("example", pa.int64(), nullable=False),  # from 0, in the order of the tar
        pa.field("key", pa.string(), nullable=False),  # of the example
        pa.field("extension", pa.string(), nullable=False),  # empty in the row of the rest that cannot be read
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("problem", pa.string()),  # the reason why the member, or the rest, must not be read
    ]
)
"""An index has one row per member."""


class TarTable(Table):
    """Examples of local tars by number.

    In memory are only the keys, and an index of 16 bytes per example and extension.
    """

    def __init__(self, name: str, path: str, files: list[str], root: Path) -> None:
        self._files = files
        self._keys: list[str] = []
        self._refused: dict[tuple[str, int], Unreadable] = {}
        self._lost: dict[int, UnreadableRest] = {}
        shards: list[int] = []
        places: dict[str, dict[int, tuple[int, int]]] = {}
        for shard, file in enumerate(files):
            first = len(shards)
            for example, key, extension, offset, size, problem in zip(*(c.to_pylist() for c in tar_index(file))):
                row = first + example
                if row == len(shards):
                    shards.append(shard)
                    self._keys.append(key)
                if not extension:
                    self._lost[row] = UnreadableRest(problem)
                    continue
                if problem is not None:
                    self._refused[extension, row] = Unreadable(problem)
                places.setdefault(extension, {})[row] = offset, size
            if len(places) > MAX_EXTENSIONS:
                some = ", ".join(f".{extension}" for extension in list(places)[-2:])
                raise UserError(
                    f"source {name}: {file}: more than {MAX_EXTENSIONS} extensions, such as {some}; an "
                    "extension is everything after a name's first dot, and names a column"
                )
        if self._lost and not places:
            raise UserError(f"source {name}: {files[shards[0]]}: {self._lost[0].reason}")
        self._shards = np.array(shards, dtype=np.int32)
        self._places = {extension: _dense(by_row, len(shards)) for extension, by_row in places.items()}
        self._fields = {"__key__": ("__key__", "")}
        for extension, by_row in places.items():
            values = (self._member(extension, [row])[0] for row in by_row)
            value = next((value for value in values if not isinstance(value, Unreadable)), None)
            for column in flatten(extension, value):
                self._fields[column] = (extension, column[len(extension) + 1 :])
        # Members have no paths outside of their tar.
        super().__init__(name, path, list(self._fields), None, partial(fingerprint, root, files))

    def _size(self) -> int:
        return len(self._shards)

    def _column(self, column: str, rows: Sequence[int]) -> list[Any]:
        extension, key = self._fields[column]
        values = [self._keys[row] for row in rows] if extension == "__key__" else self._member(extension, rows)
        if key:  # of a JSON object
            objects = (value if isinstance(value, dict | Unreadable) else {} for value in values)
            values = [value.get(key) if isinstance(value, dict) else value for value in objects]
        return [self._lost.get(row, value) for row, value in zip(rows, values)] if self._lost else values

    def _member(self, extension: str, rows: Sequence[int]) -> list[Any]:
        """The values of one extension. Each tar is opened once and read in the order of its bytes."""
        places = self._places[extension]
        values: list[Any] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: (self._shards[rows[i]], places[rows[i], 0]))
        for shard, group in groupby(order, key=lambda i: self._shards[rows[i]]):
            with open(self._files[shard], "rb", buffering=0) as file:
                for i in group:
                    offset, size = map(int, places[rows[i]])
                    refused = self._refused.get((extension, int(rows[i])))
                    if offset >= 0 and refused is None:
                        file.seek(offset)
                        values[i] = parse(extension, file.read(size))
                    else:
                        values[i] = refused
        return values

    def _row_name(self, row: int) -> str:
        return f"{Path(self._files[self._shards[row]]).name}[{self._keys[row]}]"


def _dense(found: dict[int, tuple[int, int]], rows: int) -> np.ndarray:
    """(rows, 2) int64, the offset and size of each example's member; offset -1 if it has none."""
    places = np.full((rows, 2), -1, dtype=np.int64)
    places[list(found)] = list(found.values())
    return places


def tar_index(file: str) -> pa.Table:
    """The index of a tar, with the columns of `SCHEMA`: from the cache folder, or made and stored there."""
    about = os.stat(file)
    name = stable_hash([LAYOUT, os.path.realpath(file), about.st_size, about.st_mtime_ns])
    cached: Path | None = None
    with suppress(OSError, UserError):  # Without a cache folder of one's own, nothing is stored.
        cached = cache_folder("tars") / name
        return _read(cached, about.st_size)
    index = _scan(file)
    with suppress(OSError):
        if cached is not None:
            _write(cached, index)
    return index


def _scan(file: str) -> pa.Table:
    columns: list[list[Any]] = [[] for _ in SCHEMA]
    with open_forward(file) as handle:
        found = examples(handle, lambda _, member: (member.offset_data, member.size))
        for number, example in enumerate(found):
            for extension, place in example.members.items():
                problem = place.reason if isinstance(place, Unreadable) else None
                offset, size = place if problem is None else (0, 0)
                for column, value in zip(columns, (number, example.key, extension, offset, size, problem)):
                    column.append(value)
            if example.lost:
                for column, value in zip(columns, (number, example.key, "", 0, 0, example.lost.reason)):
                    column.append(value)
    return pa.table(columns, SCHEMA)


def _write(file: Path, index: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_table(index)
    data = sink.getvalue().to_pybytes()
    with replacing(file) as draft:
        draft.write(hashlib.sha256(data).digest() + data)


def _read(file: Path, size: int) -> pa.Table:
    """The index in a file, of a tar of `size` bytes. OSError if there is none, or it must not be used."""
    digest, data = (content := file.read_bytes())[:32], content[32:]
    if hashlib.sha256(data).digest() != digest:
        raise OSError("damaged")
    try:
        with pa.ipc.open_stream(data) as reader:
            index = reader.read_all()
        index.validate(full=True)
    except pa.ArrowException:
        raise OSError("damaged") from None
    if index.schema != SCHEMA or any(index[field.name].null_count for field in SCHEMA if not field.nullable):
        raise OSError("its columns are not those of an index")
    example, offset, length = (index[name].to_numpy() for name in ("example", "offset", "size"))
    numbered = not len(example) or (example[0] == 0 and np.isin(np.diff(example), (0, 1)).all())
    inside = (offset >= 0) & (length >= 0) & (length <= MAX_BYTES) & (offset <= size) & (length <= size - offset)
    if not (numbered and inside.all()):
        raise OSError("it leads out of the tar")
    return index
