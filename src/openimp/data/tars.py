"""WebDataset tars: consecutive members with the same key form an example, and each extension is a column.

They are read with `tarfile`, forward, as shards of a stream. A stream resumes from a byte offset, without reading what
came before.
"""

import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, Any

from openimp.common.errors import UserError
from openimp.data.files import open_forward
from openimp.data.tables import Unreadable, UnreadableRest

INTEGERS = {"cls", "cls2", "id", "index", "inx"}
"""Extensions that hold one integer, by the convention of WebDataset."""
MAX_BYTES = 2**31
"""Largest size of a member. The size that a header claims is allocated before the member is read."""
DAMAGE = (tarfile.TarError, ValueError, OverflowError, RecursionError)
"""What tarfile raises for a damaged tar: it does not check the numbers in headers, and calls itself for each in a chain
of headers."""
COLUMN_EXAMPLES = 100
"""Number of examples at the beginning of a stream among which its columns are looked up."""


@dataclass
class Example:
    """Members with the same name up to the first dot."""

    key: str  # the part up to that dot
    members: dict[str, Any] = field(default_factory=dict)  # by lower-case extension: from `load`, or an `Unreadable`
    end: int = 0  # offset of the next example in the file, or the size of the file
    lost: UnreadableRest | None = None  # the error, if this example represents the unreadable rest of the file


def examples(file: IO[bytes], load: Callable[[IO[bytes], tarfile.TarInfo], Any]) -> Iterator[Example]:
    """The examples of a seekable tar from its current position, which must be the beginning of a member or the end.

    If the tar is truncated or damaged, its last example represents the unreadable rest. This rest begins with the
    example that the damage may have reached.
    """
    current: Example | None = None
    try:
        for member, refused in members(file):
            key, extension = split_name(member.name)
            if not extension:
                continue
            if current is None or current.key != key:
                if current is not None:
                    current.end = member.offset
                    yield current
                current = Example(key)
            if extension in current.members:
                current.members[extension] = Unreadable(f"example {key} has two members .{extension}")
            else:
                current.members[extension] = refused or load(file, member)
    except DAMAGE as error:
        current = Example("the rest", lost=UnreadableRest(f"not a readable tar from here on: {error}"))
    if current is not None:
        current.end = file.seek(0, os.SEEK_END)
        yield current


def members(file: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, Unreadable | None]]:
    """The members of a seekable tar from its current position, without folders, each with its `refusal`.

    If the tar is truncated or damaged, one of `DAMAGE` is raised after the last member that can be read.
    """
    start = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(start)
    if start == size > 0:
        return
    bounded: Any = _Bounded(file, size)
    # A name that is not UTF-8 becomes text that can be stored and printed.
    tar: Any = tarfile.open(fileobj=bounded, mode="r:", errors="backslashreplace")  # noqa: SIM115
    empty = tar.firstmember is None  # Then `next` fails in Python 3.10.
    while not empty and (member := tar.next()) is not None:
        tar.members = []  # Otherwise tarfile would keep all headers in memory.
        if tar.offset <= member.offset:  # A negative size would lead to the same member forever.
            raise tarfile.ReadError(f"{member.name} ends before it begins")
        if not member.isdir():
            yield member, refusal(member, size - member.offset_data)
        file.seek(tar.offset)  # tarfile would seek to the byte before, and buffers would be read again.
    # tarfile takes half a header, or a file without the two empty blocks at its end, for complete.
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("unexpected end of data")


class _Bounded:
    """Limits reads to the size of the file, because tarfile reads as many bytes of a long name as a header claims."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size = file, size
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        return self._file.read(max(0, min(size, self._size - self.tell(), MAX_BYTES)))


def split_name(name: str) -> tuple[str, str]:
    """Splits a member's name at the first dot of its last component: (key, extension), or ("", "") without a dot."""
    match = re.match(r"^((?:.*/|)[^./]+)[.]([^/]+)$", name.removeprefix("./"))
    return (match[1], match[2].lower()) if match else ("", "")


def refusal(member: tarfile.TarInfo, left: int) -> Unreadable | None:
    """The reason why a member must not be read, if there is one. `left` is the number of bytes until the file's end."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return Unreadable(f"{member.name} leaves the folder of its archive")
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
        return Unreadable(f"{member.name} is not a regular file")
    if not 0 <= member.size <= min(left, MAX_BYTES):
        return Unreadable(f"{member.name} claims {member.size} bytes; {min(left, MAX_BYTES)} may be read")
    return None


def read_member(file: IO[bytes], member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)


def parse(extension: str, data: bytes) -> Any:
    """Parses a member's bytes: `txt` to text, `json` to its data, and the extensions in `INTEGERS` to integers."""
    kind = extension.rsplit(".", 1)[-1]
    try:
        if kind == "txt":
            return data.decode()
        if kind in INTEGERS:
            return int(data)
        if kind == "json":
            return json.loads(data)
    except (ValueError, RecursionError) as error:
        return Unreadable(f"its .{extension} cannot be read: {error}")
    return data


def flatten(extension: str, value: Any) -> dict[str, Any]:
    """The columns of a member: `json.KEY` for each key of a JSON object, else the extension itself."""
    if isinstance(value, dict):
        return {f"{extension}.{key}": item for key, item in value.items()}
    return {extension: value}


class TarShards:
    """Tars, local or opened by fsspec, as `streams.Shards`. A state is the byte at which the next example begins."""

    def __init__(self, name: str, files: list[str]) -> None:
        self._name = name
        self._files = files
        self.columns: list[str] = []
        columns: list[str] = []
        # A JSON member that cannot be parsed does not tell its keys, so a completely readable example is preferred.
        rows = (row for shard in range(len(files)) for (_, row), _ in self.rows(shard, None))
        for row in islice(rows, COLUMN_EXAMPLES):
            readable = not any(isinstance(value, Unreadable) for value in row.values())
            columns = list(row) if readable or not columns else columns
            if readable:
                break
        self.columns = columns

    def __len__(self) -> int:
        return len(self._files)

    def rows(self, shard: int, state: int | None) -> Iterator[tuple[tuple[str, dict[str, Any]], int]]:
        file = self._files[shard]
        label = file.rsplit("/", 1)[-1]
        try:
            with open_forward(file) as handle:
                handle.seek(state or 0)
                for example in examples(handle, read_member):
                    row = dict.fromkeys(self.columns, example.lost) if example.lost else to_row(example)
                    if example.lost and not row:
                        raise UserError(f"source {self._name}: {file}: {example.lost.reason}")
                    yield (f"{label}[{example.key}]", row), example.end
        except (OSError, ImportError) as error:  # fsspec imports the package that a URL needs.
            raise UserError(f"source {self._name}: {file}: not a readable tar: {error}") from None


def to_row(example: Example) -> dict[str, Any]:
    """The columns of an example, with its members parsed."""
    row = {"__key__": example.key}
    for extension, data in example.members.items():
        row |= flatten(extension, data if isinstance(data, Unreadable) else parse(extension, data))
    return row
