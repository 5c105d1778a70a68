"""WebDataset tars: consecutive members with the same key form a sample, which is a row, and each extension is a column.

They are read with `tarfile`, forward, as shards of a stream. A stream resumes from a byte offset, without reading what
came before.
"""

import json
import os
import re
import sys
import tarfile
from bisect import bisect_left
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from openimp.common.errors import UserError
from openimp.common.safe_files import LARGEST_TEXT
from openimp.data.files import open_forward
from openimp.data.streams import NamedRow
from openimp.data.tables import REST, Unreadable, UnreadableRest

KEY = "__key__"
"""The column with the key of a sample, as WebDataset calls it."""
INTEGERS = {"cls", "cls2", "id", "index", "inx"}
"""Extensions that hold one integer, by the convention of WebDataset."""
PARSED = INTEGERS | {"txt", "json"}
"""Extensions whose members are parsed. Others are bytes."""
MAX_BYTES = 2**31
"""Largest size of a member. The size that a header claims is allocated before the member is read."""
GZIP = b"\x1f\x8b"
DAMAGE = (tarfile.TarError, ValueError, OverflowError, RecursionError)
"""What tarfile raises for a damaged tar: it does not check the numbers in headers, and calls itself for each header of
a chain."""
COLUMN_SAMPLES = 100
"""A stream has the columns of this many samples at its beginning, or of fewer if they exceed COLUMN_BYTES."""
COLUMN_BYTES = 2**26


class TarShards:
    """Tars, local or opened by fsspec, as `streams.Shards`. A state is the byte at which the next sample begins."""

    def __init__(self, name: str, files: list[str]) -> None:
        self._name = name
        self._files = files
        self.columns: list[str] = []  # `rows` reads it.
        columns: dict[str, None] = {}
        damage = ""
        readable: set[str] = set()
        for row_name, row in islice(self._first_rows(), COLUMN_SAMPLES):
            columns |= dict.fromkeys(row)
            readable.update(column for column, value in row.items() if not isinstance(value, Unreadable))
            if isinstance(row[KEY], Unreadable):
                damage = damage or f"{row_name}: {row[KEY].reason}"
        in_order = sorted(readable)

        def is_divided(column: str) -> bool:
            """Whether the JSON member of another sample is read as columns `json.KEY`."""
            following = bisect_left(in_order, f"{column}.")
            return following < len(in_order) and in_order[following].startswith(f"{column}.")

        # The JSON member of a sample that cannot be read is no column, if another sample has one that can.
        self.columns = [column for column in columns if column in readable or not is_divided(column)]
        if damage and not readable:
            raise UserError(f"source {name}: {damage}")

    def __len__(self) -> int:
        return len(self._files)

    def _first_rows(self) -> Iterator[NamedRow]:
        """The rows of the first `COLUMN_BYTES`, shard by shard."""
        bytes_before = 0
        for shard in range(len(self._files)):
            end = 0
            for named_row, position in self.rows(shard, None):
                yield named_row
                if not isinstance(named_row[1][KEY], Unreadable):  # The unreadable rest of a shard was not read.
                    end = position
                if bytes_before + end >= COLUMN_BYTES:
                    return
            bytes_before += end

    def rows(self, shard: int, state: int | None) -> Iterator[tuple[NamedRow, int]]:
        """The rows of a tar. If it is truncated or damaged, the last one represents the unreadable rest, which begins
        with the sample that the damage may have reached."""
        file = self._files[shard]
        label = Path(file).name
        try:
            with open_forward(file) as handle:
                handle.seek(state or 0)
                end = state or 0
                try:
                    for key, members, end in _samples(handle):
                        yield (f"{label}[{key}]", _row(key, members)), end
                except DAMAGE as error:
                    size = handle.seek(0, os.SEEK_END)
                    rest = UnreadableRest(f"not a readable tar from byte {end:,} of {size:,} on: {error}")
                    yield (f"{label}{REST}", dict.fromkeys([KEY, *self.columns], rest)), size
        except (OSError, ImportError) as error:  # fsspec imports the package that a URL needs.
            raise UserError(f"source {self._name}: {file}: cannot be read: {error}") from None


def _samples(file: IO[bytes]) -> Iterator[tuple[str, dict[str, Any], int]]:
    """The samples of a seekable tar from its current position, which must be the beginning of a member or the end.

    Each is its key, the values of its members by extension in lower case, and the byte at which it ends. If the tar is
    truncated or damaged, one of `DAMAGE` is raised after the last whole sample.
    """
    key = ""
    members: dict[str, Any] = {}
    for member, refused in _members(file):
        folder, slash, base = member.name.removeprefix("./").rpartition("/")
        stem, _, extension = base.partition(".")
        if not stem or not extension:
            continue
        member_key = folder + slash + stem
        extension = extension.lower()
        if members and member_key != key:
            yield key, members, member.offset
            members = {}
        key = member_key
        if extension in members:
            members[extension] = Unreadable(f"example {key} has two members .{extension}")
        elif reason := refused or _too_large(extension, member.size):
            members[extension] = reason
        else:
            file.seek(member.offset_data)
            members[extension] = _parse(extension, file.read(member.size))
    if members:
        yield key, members, file.seek(0, os.SEEK_END)


def _row(key: str, members: dict[str, Any]) -> dict[str, Any]:
    """The columns of a sample: `json.KEY` for each key of a JSON object, and the extensions of the other members."""
    row: dict[str, Any] = {KEY: key}
    for extension, value in members.items():
        if isinstance(value, dict):
            row |= {f"{extension}.{name}": item for name, item in value.items()}
        else:
            row[extension] = value
    return row


def _members(file: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, Unreadable | None]]:
    """The members of a seekable tar from its current position, without folders, each with its `_refusal`.

    If the tar is truncated or damaged, one of `DAMAGE` is raised after the last member that can be read.
    """
    start = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(start)
    if start == size > 0:
        return
    if start == 0:
        if file.read(2) == GZIP:
            raise tarfile.ReadError("it is compressed; unpack it with gunzip")
        file.seek(0)
    bounded: Any = _Bounded(file, size)
    # A name that is not UTF-8 becomes text that can be stored and printed.
    tar: Any = tarfile.open(fileobj=bounded, mode="r:", errors="backslashreplace")  # noqa: SIM115
    empty = tar.firstmember is None  # Then `next` fails in Python 3.10.
    while not empty and (member := tar.next()) is not None:
        tar.members = []  # Otherwise tarfile would keep all headers in memory.
        if tar.offset <= member.offset:  # A negative size would lead to the same member forever.
            raise tarfile.ReadError(f"{member.name} ends before it begins")
        if not member.isdir():
            yield member, _refusal(member, size - member.offset_data)
        file.seek(tar.offset)  # tarfile would seek to the byte before, and buffers would be read again.
    # tarfile takes half a header, or a file without the two empty blocks at its end, for complete.
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("unexpected end of data")


class _Bounded:
    """Limits reads to the size of the file, because tarfile reads as many bytes of a long name as a header claims."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._size = size
        self.seek = file.seek
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        return self._file.read(max(0, min(size, self._size - self.tell(), MAX_BYTES)))


def _refusal(member: tarfile.TarInfo, left: int) -> Unreadable | None:
    """The reason why a member must not be read, if there is one. `left` is the number of bytes until the file's end."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return Unreadable(f"{member.name} leaves the folder of its archive")
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
        return Unreadable(f"{member.name} is not a regular file")
    if not 0 <= member.size <= min(left, MAX_BYTES):
        return Unreadable(f"{member.name} claims {member.size} bytes; {min(left, MAX_BYTES)} may be read")
    return None


def _too_large(extension: str, size: int) -> Unreadable | None:
    """The reason why a member of this size is not parsed, if there is one."""
    if size <= LARGEST_TEXT or _kind(extension) not in PARSED:
        return None
    return Unreadable(f"its .{extension} has {size:,} bytes; of a text, {LARGEST_TEXT:,} may be read")


def _kind(extension: str) -> str:
    return extension.rpartition(".")[2]


def _parse(extension: str, data: bytes) -> Any:
    """Parses a member's bytes: `txt` to text, `json` to its data, and the extensions in `INTEGERS` to integers."""
    kind = _kind(extension)
    try:
        if kind == "txt":
            return _decoded(data, "utf-8-sig")  # Windows programs write a byte order mark.
        if kind in INTEGERS:
            return int(_decoded(data, "utf-8-sig"))
        if kind == "json":
            return _parse_json(data)
    except (ValueError, RecursionError) as error:
        return Unreadable(f"its .{extension} cannot be read: {error}")
    return data


def _decoded(data: bytes, encoding: str) -> str:
    return _limited(data.decode(encoding), width=1)


def _parse_json(data: bytes) -> Any:
    text = data.decode(json.detect_encoding(data), "surrogatepass")
    # Python stores all characters of a text in as many bytes as its widest one needs, which may be an escape: two for
    # most letters, four for characters such as \ud83d\ude00.
    width = 4 if re.search(r"\\u[dD][89abAB]", text) else 2 if "\\u" in text else 1
    return json.loads(_limited(text, width))


def _limited(text: str, width: int) -> str:
    """A text. ValueError if it would take more than `LARGEST_TEXT` bytes of memory with this many per character."""
    size = max(sys.getsizeof(text), width * len(text))
    if size > LARGEST_TEXT:
        raise ValueError(f"it takes {size:,} bytes of memory; of a text, {LARGEST_TEXT:,} may be read")
    return text
