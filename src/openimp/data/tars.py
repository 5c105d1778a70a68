"""WebDataset tars: members grouped by name into examples, a column an extension.

Read by `tarfile` and not by `datasets`, which would copy every tar into an Arrow file: a tar is an index already, so a
table needs the members' offsets only, and a stream goes on from a byte offset without reading what came before.
"""

import json
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import numpy as np

from openimp.data.files import fingerprint
from openimp.data.tables import Refused, Table
from openimp.errors import UserError

NUMBERS = {"cls", "cls2", "id", "index", "inx"}
"""Extensions that hold one integer, by the convention of WebDataset."""


@dataclass
class Example:
    """Members whose names are equal up to the first dot.

    Attributes:
        key: that name.
        members: what `load` gave for each, or a `Refused`, by extension in lower case.
        end: the offset of the next example in the file; None for the last.
    """

    key: str
    members: dict[str, Any] = field(default_factory=dict)
    end: int | None = None


def examples(file: IO[bytes], load: Callable[[tarfile.TarInfo], Any]) -> Iterator[Example]:
    """The examples of an open, seekable tar from where it stands, which must be where a member begins.

    Raises:
        tarfile.TarError: it is no tar, or cut off.
    """
    tar: Any = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
    current: Example | None = None
    while (member := tar.next()) is not None:
        tar.members = []  # tarfile would keep every header
        key, extension = split_name(member.name)
        if member.isdir() or not extension:
            continue
        if current is None or current.key != key:
            if current is not None:
                current.end = member.offset
                yield current
            current = Example(key)
        if extension in current.members:
            raise tarfile.TarError(f"example {key} has two members .{extension}")
        current.members[extension] = refusal(member) or load(member)
    if current is not None:
        yield current


def split_name(name: str) -> tuple[str, str]:
    """A member's name parted at the first dot of its last component, (key, extension); ("", "") if it has none."""
    match = re.match(r"^((?:.*/|)[^./]+)[.]([^/]+)$", name.removeprefix("./"))
    return (match[1], match[2].lower()) if match else ("", "")


def refusal(member: tarfile.TarInfo) -> Refused | None:
    """Why a member must not be read: its name leaves the archive, or it is a link, a device or sparse."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return Refused(f"{member.name} leaves the folder of its archive")
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
        return Refused(f"{member.name} is no regular file")
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
    except ValueError as error:
        return Refused(f"its .{extension} cannot be read: {error}")
    return data


def flatten(extension: str, value: Any) -> dict[str, Any]:
    """The columns of a member's value: the keys of a JSON object as `json.KEY`, else the extension itself."""
    if isinstance(value, dict):
        return {f"{extension}.{key}": item for key, item in value.items()}
    return {extension: value}


def pick(value: Any, key: str) -> Any:
    """One key of a JSON object; None if it is not there, and a `Refused` as it is."""
    return value.get(key) if isinstance(value, dict) else value if isinstance(value, Refused) else None


class TarTable(Table):
    """Examples of local tars by number. What it holds is an index, 16 bytes a member; the tars are read when asked."""

    def __init__(self, name: str, path: str, files: list[str], root: Path) -> None:
        """
        Raises:
            UserError: a tar is corrupt.
        """
        self._files = files
        self._root = root
        self._keys: list[str] = []
        self._refused: dict[tuple[str, int], Refused] = {}
        shards: list[int] = []
        places: dict[str, dict[int, tuple[int, int]]] = {}
        for shard, file in enumerate(files):
            try:
                with open(file, "rb") as handle:
                    for example in examples(handle, lambda member: (member.offset_data, member.size)):
                        for extension, place in example.members.items():
                            if isinstance(place, Refused):
                                self._refused[extension, len(shards)] = place
                                place = (0, 0)
                            places.setdefault(extension, {})[len(shards)] = place
                        self._keys.append(example.key)
                        shards.append(shard)
            except tarfile.TarError as error:
                raise UserError(f"source {name}: {file}: not a readable tar: {error}") from None
        self._shards = np.array(shards, dtype=np.int32)
        self._places = {extension: _dense(found, len(shards)) for extension, found in places.items()}
        self._fields = {"__key__": ("__key__", "")}
        for extension, found in places.items():
            for column in flatten(extension, self._member(extension, [next(iter(found))])[0]):
                self._fields[column] = (extension, column[len(extension) + 1 :])
        # Members have no paths outside their tar.
        super().__init__(name, path, list(self._fields), None)

    def _size(self) -> int:
        return len(self._shards)

    def _column(self, column: str, rows: Sequence[int]) -> list[Any]:
        extension, key = self._fields[column]
        if extension == "__key__":
            return [self._keys[row] for row in rows]
        values = self._member(extension, rows)
        return [pick(value, key) for value in values] if key else values

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

    def _where(self, row: int) -> str:
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
            UserError: the first tar cannot be read.
        """
        self._name = name
        self._files = files
        self._state = {"shard": 0, "offset": 0}
        self.columns = list(next(self.rows(None), ("", {}))[1])

    def rows(self, state: dict[str, Any] | None) -> Iterator[tuple[str, dict[str, Any]]]:
        """See `streams.Reader`; the state is the byte at which the next example begins."""
        first, offset = (state["shard"], state["offset"]) if state else (0, 0)
        for shard in range(first, len(self._files)):
            file = self._files[shard]
            try:
                for example in read_examples(file, offset):
                    ended = example.end is None
                    self._state = {"shard": shard + ended, "offset": example.end or 0}
                    yield f"{file.rsplit('/', 1)[-1]}[{example.key}]", to_row(example)
            except (tarfile.TarError, OSError, ImportError) as error:  # fsspec imports what a URL needs
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
        row |= flatten(extension, data if isinstance(data, Refused) else parse(extension, data))
    return row
