"""WebDataset tars: members grouped by name into examples, a column an extension.

Read by `tarfile` and not by `datasets`, which would copy every tar into an Arrow file: a tar is an index already, so a
table needs the members' offsets only, and a stream goes on from a byte offset without reading what came before.
"""

import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from openimp.common.errors import UserError
from openimp.data.files import fingerprint
from openimp.data.tables import Table, Unreadable, UnreadableRest

NUMBERS = {"cls", "cls2", "id", "index", "inx"}
"""Extensions that hold one integer, by the convention of WebDataset."""
LARGEST = 2**31
"""Bytes of a member at most; what a header claims is allocated before it is read."""
MOST = 256
"""Extensions of a table at most. Each is a column as long as the table, and an extension is all that follows a name's
first dot, so in a tar of a1.v1.jpg, a2.v2.jpg, ... each member would have its own."""
LOOKED = 100
"""Examples of a stream that are looked at for its columns, if there are members among them that cannot be read."""


@dataclass
class Example:
    """Members whose names are equal up to the first dot.

    Attributes:
        key: that name.
        members: what `load` gave for each, or a `Unreadable`, by extension in lower case.
        end: the offset of the next example in the file; None for the last.
        lost: why this example and all that follow it in the file cannot be read; it is the last then, without members.
    """

    key: str
    members: dict[str, Any] = field(default_factory=dict)
    end: int | None = None
    lost: UnreadableRest | None = None


def examples(file: IO[bytes], load: Callable[[tarfile.TarInfo], Any]) -> Iterator[Example]:
    """The examples of an open, seekable tar from where it stands, which must be where a member begins.

    If it is cut off, or is no tar, its last example is one for all that cannot be read, from the beginning of the
    example that the cut may have gone through.
    """
    start = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(start)
    current: Example | None = None
    try:
        tar: Any = tarfile.open(fileobj=_Bounded(file, size), mode="r:")  # type: ignore[call-overload]  # noqa: SIM115
        while (member := tar.next()) is not None:
            tar.members = []  # tarfile would keep every header
            if tar.offset <= member.offset:  # A negative size would lead back to it, again and again.
                raise tarfile.ReadError(f"{member.name} ends before it begins")
            key, extension = split_name(member.name)
            if member.isdir() or not extension:
                continue
            if current is None or current.key != key:
                if current is not None:
                    current.end = member.offset
                    yield current
                current = Example(key)
            if extension in current.members:
                current.members[extension] = Unreadable(f"example {key} has two members .{extension}")
            else:
                current.members[extension] = refusal(member, size - member.offset_data) or load(member)
        # tarfile takes half a header, or none where the two empty blocks of the end should be, for the end.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("unexpected end of data")
    # tarfile does not check a header's numbers, and calls itself for each of a chain of headers.
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        current = Example("the rest", lost=UnreadableRest(f"not a readable tar from here on: {error}"))
    if current is not None:
        yield current


class _Bounded:
    """A file whose reads ask for no more than it has: tarfile reads long names at the size that a header claims."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size = file, size
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        return self._file.read(max(0, min(size, self._size - self.tell(), LARGEST)))


def split_name(name: str) -> tuple[str, str]:
    """A member's name parted at the first dot of its last component, (key, extension); ("", "") if it has none."""
    match = re.match(r"^((?:.*/|)[^./]+)[.]([^/]+)$", name.removeprefix("./"))
    return (match[1], match[2].lower()) if match else ("", "")


def refusal(member: tarfile.TarInfo, left: int) -> Unreadable | None:
    """Why a member must not be read: its name leaves the archive, it is a link, a device or sparse, or is too large.

    `left` is how many bytes the file has for it.
    """
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return Unreadable(f"{member.name} leaves the folder of its archive")
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
        return Unreadable(f"{member.name} is not a regular file")
    if not 0 <= member.size <= min(left, LARGEST):
        return Unreadable(f"{member.name} claims {member.size} bytes; {min(left, LARGEST)} may be read")
    return None


def parse(extension: str, data: bytes) -> Any:
    """A member's bytes as its column's value: `txt` a string, `cls` and the like an integer, `json` its data."""
    kind = extension.rsplit(".", 1)[-1]
    try:
        if kind == "txt":
            return data.decode()
        if kind in NUMBERS:
            return int(data)
        if kind == "json":
            return json.loads(data)
    except (ValueError, RecursionError) as error:
        return Unreadable(f"its .{extension} cannot be read: {error}")
    return data


def flatten(extension: str, value: Any) -> dict[str, Any]:
    """The columns of a member's value: the keys of a JSON object as `json.KEY`, else the extension itself."""
    if isinstance(value, dict):
        return {f"{extension}.{key}": item for key, item in value.items()}
    return {extension: value}


def pick(value: Any, key: str) -> Any:
    """One key of a JSON object; None if it is not there, and a `Unreadable` as it is."""
    return value.get(key) if isinstance(value, dict) else value if isinstance(value, Unreadable) else None


class TarTable(Table):
    """Examples of local tars by number. What it holds is an index, 16 bytes for each example and extension; the tars
    are read when asked."""

    def __init__(self, name: str, path: str, files: list[str], root: Path) -> None:
        """
        Raises:
            UserError: no example of any tar can be read, or their members have too many extensions.
        """
        self._files = files
        self._root = root
        self._keys: list[str] = []
        self._refused: dict[tuple[str, int], Unreadable] = {}
        self._lost: dict[int, UnreadableRest] = {}
        shards: list[int] = []
        places: dict[str, dict[int, tuple[int, int]]] = {}
        for shard, file in enumerate(files):
            with open(file, "rb") as handle:
                for example in examples(handle, lambda member: (member.offset_data, member.size)):
                    for extension, place in example.members.items():
                        if isinstance(place, Unreadable):
                            self._refused[extension, len(shards)] = place
                            place = (0, 0)
                        places.setdefault(extension, {})[len(shards)] = place
                    if len(places) > MOST:
                        some = ", ".join(f".{extension}" for extension in list(places)[-2:])
                        raise UserError(
                            f"source {name}: {file}: more than {MOST} extensions, such as {some}; an extension is all "
                            "that follows a name's first dot, and names a column"
                        )
                    if example.lost:
                        self._lost[len(shards)] = example.lost
                    self._keys.append(example.key)
                    shards.append(shard)
        if self._lost and not places:
            raise UserError(f"source {name}: {files[shards[0]]}: {self._lost[0].reason}")
        self._shards = np.array(shards, dtype=np.int32)
        self._places = {extension: _dense(found, len(shards)) for extension, found in places.items()}
        self._fields = {"__key__": ("__key__", "")}
        for extension, found in places.items():
            values = (self._member(extension, [row])[0] for row in found)
            value = next((value for value in values if not isinstance(value, Unreadable)), None)
            for column in flatten(extension, value):
                self._fields[column] = (extension, column[len(extension) + 1 :])
        # Members have no paths outside their tar.
        super().__init__(name, path, list(self._fields), None)

    def _size(self) -> int:
        return len(self._shards)

    def _column(self, column: str, rows: Sequence[int]) -> list[Any]:
        extension, key = self._fields[column]
        values = [self._keys[row] for row in rows] if extension == "__key__" else self._member(extension, rows)
        values = [pick(value, key) for value in values] if key else values
        return [self._lost.get(row, value) for row, value in zip(rows, values)] if self._lost else values

    def _member(self, extension: str, rows: Sequence[int]) -> list[Any]:
        """One extension's values, each tar opened once and read in the order of its bytes."""
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

    def _content(self) -> str:
        return fingerprint(self._root, self._files)

    def paths(self, column: str) -> list[str]:
        return []


def _dense(found: dict[int, tuple[int, int]], rows: int) -> np.ndarray:
    """(rows, 2) int64, each example's offset and size; offset -1 where it has no such member."""
    places = np.full((rows, 2), -1, dtype=np.int64)
    places[list(found)] = list(found.values())
    return places


class TarReader:
    """The examples of tars in order, one tar after the other, local or opened by fsspec."""

    def __init__(self, name: str, files: list[str]) -> None:
        """
        Raises:
            UserError: no example can be read.
        """
        self._name = name
        self._files = files
        self.columns: list[str] = []
        self._state = {"shard": 0, "offset": 0}
        self.columns = self._columns()

    def _columns(self) -> list[str]:
        """Those of the first example whose members can all be read, if there is one near, for a JSON member that cannot
        be parsed does not tell its keys."""
        columns: list[str] = []
        for _, row in islice(self.rows(None), LOOKED):
            columns = columns or list(row)
            if not any(isinstance(value, Unreadable) for value in row.values()):
                return list(row)
        return columns

    def rows(self, state: dict[str, Any] | None) -> Iterator[tuple[str, dict[str, Any]]]:
        """See `streams.Reader`; the state is the byte at which the next example begins."""
        first, offset = (state["shard"], state["offset"]) if state else (0, 0)
        for shard in range(first, len(self._files)):
            file = self._files[shard]
            try:
                for example in read_examples(file, offset):
                    ended = example.end is None
                    self._state = {"shard": shard + ended, "offset": example.end or 0}
                    row = dict.fromkeys(self.columns, example.lost) if example.lost else to_row(example)
                    if example.lost and not row:
                        raise UserError(f"source {self._name}: {file}: {example.lost.reason}")
                    yield f"{file.rsplit('/', 1)[-1]}[{example.key}]", row
            except (OSError, ImportError) as error:  # fsspec imports what a URL needs
                raise UserError(f"source {self._name}: {file}: not a readable tar: {error}") from None
            offset = 0

    def state(self) -> dict[str, Any]:
        """See `streams.Reader`."""
        return dict(self._state)


def read_examples(path: str, offset: int) -> Iterator[Example]:
    """The examples of a tar with their members' bytes, from a byte at which a member begins."""
    import fsspec

    with fsspec.open(path, "rb") as file:

        def load(member: tarfile.TarInfo) -> bytes:
            file.seek(member.offset_data)
            return file.read(member.size)

        file.seek(offset)
        yield from examples(file, load)


def to_row(example: Example) -> dict[str, Any]:
    """An example's columns, with the bytes of its members parsed."""
    row = {"__key__": example.key}
    for extension, data in example.members.items():
        row |= flatten(extension, data if isinstance(data, Unreadable) else parse(extension, data))
    return row
