"""Keeps the decoded arrays of a column, in memory or on disk, so that small data is decoded only once."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock

from openimp.common.modality import BadMedia, Modality
from openimp.common.safe_files import cache_folder
from openimp.data.files import digest, stable_hash
from openimp.data.tables import Table

log = logging.getLogger(__name__)

LAYOUT = 1
"""Version of the file format. Files of another version are not read but written again."""
ALIGN = 64
"""Each array begins at a multiple of this many bytes, so that it is aligned for any type."""
CHUNK = 256
"""Number of rows that are read and decoded together."""

Progress = Callable[[Iterable[Any], str], Iterable[Any]]


class DecodedStore:
    """The decoded arrays of a table's column: `store[row]`, read-only.

    All arrays are in one buffer, which processes share: forked workers inherit a buffer in memory, and a file is
    memory-mapped. A store on disk pickles only its path.
    """

    def __init__(
        self, buffer: np.ndarray, index: dict[str, np.ndarray], failures: dict[int, str], folder: Path | None = None
    ) -> None:
        """
        Args:
            buffer: (bytes,) uint8.
            index: `offset` (rows,) int64 in bytes, `shape` (rows, axes) int64 padded with -1, `dtype` (rows,) str.
            failures: error message of each row that could not be decoded.
            folder: its folder if it is on disk.
        """
        self._buffer = buffer
        self._buffer.flags.writeable = False
        self._index = index
        self._failures = failures
        self._folder = folder

    def __len__(self) -> int:
        return len(self._index["offset"])

    def __getitem__(self, row: int) -> np.ndarray:
        """The decoded array of a row.

        Raises:
            BadMedia: the row could not be decoded.
        """
        if row in self._failures:
            raise BadMedia(self._failures[row])
        shape = [side for side in self._index["shape"][row].tolist() if side >= 0]
        return np.ndarray(shape, self._index["dtype"].item(row), self._buffer, self._index["offset"].item(row))

    def __reduce__(self) -> tuple[Any, ...]:
        if self._folder is not None:
            return _read, (self._folder,)
        return DecodedStore, (self._buffer, self._index, self._failures)

    @classmethod
    def build(
        cls,
        table: Table,
        modality: Modality,
        column: str,
        views: list[Any],
        where: Literal["memory", "disk"] = "memory",
        progress: Progress | None = None,
    ) -> "DecodedStore":
        """Decodes a column, or opens the store on disk of an earlier run.

        A store on disk is found by a hash of the data, the modality's options, the views and the version of openimp. Of
        several processes that need the same store, one writes it and the others wait.

        Args:
            table, modality, column: the column, and the modality that decodes it.
            views: the views that read the column. Arrays are no larger than the largest view needs.
            where: "memory", or "disk" for the cache folder.
            progress: wraps an iterable to show progress, `progress(iterable, description)`.
        """
        if where == "memory":
            buffer = bytearray()
            index, failures = _pack(_decoded(table, modality, column, views, progress), buffer.extend)
            return cls(np.frombuffer(buffer, np.uint8), index, failures)
        folder = cache_folder("decoded") / _key(table, modality, column, views)
        with FileLock(f"{folder}.lock"):
            if folder.exists():
                try:
                    return _read(folder)
                except (OSError, ValueError, KeyError, TypeError) as error:
                    log.warning("%s is damaged and will be written again: %s", folder, error)
                    shutil.rmtree(folder)
            _write(folder, _decoded(table, modality, column, views, progress))
            return _read(folder)


def _decoded(
    table: Table, modality: Modality, column: str, views: list[Any], progress: Progress | None
) -> Iterator[np.ndarray | BadMedia]:
    """Each row's array or error, in order. Threads decode them, because decoders release Python's global lock."""

    def decode(row: dict[str, Any]) -> np.ndarray | BadMedia:
        try:
            return modality.decode(table.media(row[column]), views)
        except BadMedia as error:
            return error

    rows = range(len(table))
    shown: Iterable[int] = progress(rows, f"decoding {table.name}.{column}") if progress else rows
    with ThreadPoolExecutor() as pool:
        chunks = (table.rows(rows[start : start + CHUNK], [column]) for start in rows[::CHUNK])
        arrays = chain.from_iterable(pool.map(decode, chunk) for chunk in chunks)
        yield from (array for _, array in zip(shown, arrays))


def _pack(
    decoded: Iterable[np.ndarray | BadMedia], write: Callable[[bytes], Any]
) -> tuple[dict[str, np.ndarray], dict[int, str]]:
    """Writes arrays one after the other and returns the index and the failures of their `DecodedStore`."""
    offset = 0
    offsets, shapes, dtypes = [], [], []
    failures = {}
    for row, item in enumerate(decoded):
        offsets.append(offset)
        if isinstance(item, BadMedia):
            failures[row] = str(item)
            shapes.append((0,))
            dtypes.append("|u1")
            continue
        if item.dtype.hasobject:
            raise TypeError(f"a decoded array must hold numbers, found {item.dtype}")
        shapes.append(item.shape)
        dtypes.append(item.dtype.str)
        data = item.tobytes()
        data += bytes(-len(data) % ALIGN)
        write(data)
        offset += len(data)
    shape = np.full((len(shapes), max(map(len, shapes), default=0)), -1, dtype=np.int64)
    for row, axes in enumerate(shapes):
        shape[row, : len(axes)] = axes
    return {"offset": np.array(offsets, dtype=np.int64), "shape": shape, "dtype": np.array(dtypes, dtype=str)}, failures


def _write(folder: Path, decoded: Iterable[np.ndarray | BadMedia]) -> None:
    """Writes a store's folder atomically. The caller holds its lock."""
    unfinished = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)  # From a process that was killed.
    unfinished.mkdir(mode=0o700)
    with open(unfinished / "data.bin", "wb") as file:
        index, failures = _pack(decoded, file.write)
        file.flush()
        os.fsync(file.fileno())
    np.savez(unfinished / "index.npz", allow_pickle=False, **index)
    digests = {name: digest(unfinished / name) for name in ("data.bin", "index.npz")}
    about = {"layout": LAYOUT, "digests": digests, "failures": failures}
    (unfinished / "store.json").write_text(json.dumps(about), encoding="utf-8")
    unfinished.rename(folder)


def _read(folder: Path) -> DecodedStore:
    """Opens a store's folder. Raises OSError, ValueError, KeyError or TypeError if it is damaged."""
    about = json.loads((folder / "store.json").read_text(encoding="utf-8"))
    for name in ("data.bin", "index.npz"):
        if digest(folder / name) != about["digests"][name]:
            raise ValueError(f"{name} has changed")
    with np.load(folder / "index.npz", allow_pickle=False) as file:
        index = dict(file)
    data = folder / "data.bin"
    # An empty file cannot be memory-mapped.
    buffer = np.memmap(data, np.uint8, "r") if data.stat().st_size else np.empty(0, np.uint8)
    _check(index, buffer.size)
    failures = {int(row): str(message) for row, message in dict(about["failures"]).items()}
    return DecodedStore(buffer, index, failures, folder)


def _check(index: dict[str, np.ndarray], size: int) -> None:
    """Raises ValueError or KeyError unless every array holds numbers and lies within a buffer of `size` bytes, because
    the index is used as pointers into the buffer."""
    offset, shape, names = index["offset"], index["shape"], index["dtype"]
    if [array.dtype.kind for array in (offset, shape, names)] != ["i", "i", "U"]:
        raise ValueError("the index has wrong types")
    if not (offset.shape == names.shape == shape.shape[:1] and shape.ndim == 2):
        raise ValueError("the index has columns of different lengths")
    found, numbers = np.unique(names, return_inverse=True)
    kinds = [np.dtype(name) for name in found.tolist()]
    if wrong := [kind for kind in kinds if kind.kind not in "biufc"]:
        raise ValueError(f"the arrays are of type {wrong[0]}, which is not a number")
    # Computed as floats, which do not overflow to small numbers.
    bytes_ = np.array([kind.itemsize for kind in kinds], float)[numbers] * np.where(shape < 0, 1, shape).prod(1, float)
    if (offset < 0).any() or (offset + bytes_ > size).any():
        raise ValueError("an array lies outside of the data")


def _key(table: Table, modality: Modality, column: str, views: list[Any]) -> str:
    kind = type(modality)
    options = [modality.config.model_dump_json(), sorted({view.model_dump_json() for view in views})]
    files = [(path, table.file_state(path)) for path in table.paths(column)]
    code = [LAYOUT, version("openimp"), kind.__module__, kind.__qualname__]
    return stable_hash([code, table.fingerprint, column, options, files])
