"""Decoded arrays of one column, so that small data is decoded once: in memory, or in a file under the cache folder."""

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
"""Version of the files; another one means that they are made anew."""
ALIGN = 64
"""Bytes; every array begins at a multiple, so that a view of any type is aligned."""
CHUNK = 256
"""Rows that are read and decoded together."""

Progress = Callable[[Iterable[Any], str], Iterable[Any]]


class DecodedStore:
    """The decoded arrays of a table's column: `store[row]`, read-only.

    All arrays lie in one buffer of bytes. In memory it is made in the parent process, and forked workers share it; on
    disk it is mapped, so processes share it too, and only the way to it is pickled.
    """

    def __init__(
        self, buffer: np.ndarray, index: dict[str, np.ndarray], failures: dict[int, str], folder: Path | None = None
    ) -> None:
        """
        Args:
            buffer: (bytes,) uint8.
            index: `offset` (rows,) int64 in bytes, `shape` (rows, axes) int64 padded with -1, `dtype` (rows,) str.
            failures: why a row could not be decoded, by row.
            folder: where it lies on disk.
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
            BadMedia: it could not be decoded; the message is the one from then.
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
        """Decodes a column for these views, or finds it on disk.

        A store on disk is found again by the content of the table and of the files that the column names, the modality
        with its options, the views, and the version of openimp. Of several processes that want it at once one makes it.

        Args:
            table: where the column is.
            modality: decodes it.
            column: of bytes or paths.
            views: what the arrays must be large enough for.
            where: memory, or disk: in `decoded` of the cache folder.
            progress: wraps an iterable, to show how far it is: `progress(iterable, description)`.
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
                    log.warning("%s is damaged and made anew: %s", folder, error)
                    shutil.rmtree(folder)
            _write(folder, _decoded(table, modality, column, views, progress))
            return _read(folder)


def _decoded(
    table: Table, modality: Modality, column: str, views: list[Any], progress: Progress | None
) -> Iterator[np.ndarray | BadMedia]:
    """Each row's array, or why there is none, in order; decoded by threads, for decoders let go of Python's lock."""

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
    """Writes arrays one after the other; gives back the index and the failures of `DecodedStore`."""
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
    """Makes a store's folder; it appears whole or not at all. The caller holds its lock."""
    unfinished = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)  # a process that was killed left it
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
    """Opens a store's folder; raises OSError, ValueError, KeyError or TypeError for a damaged one."""
    about = json.loads((folder / "store.json").read_text(encoding="utf-8"))
    for name in ("data.bin", "index.npz"):
        if digest(folder / name) != about["digests"][name]:
            raise ValueError(f"{name} has changed")
    with np.load(folder / "index.npz", allow_pickle=False) as file:
        index = dict(file)
    data = folder / "data.bin"
    # An empty file cannot be mapped.
    buffer = np.memmap(data, np.uint8, "r") if data.stat().st_size else np.empty(0, np.uint8)
    _check(index, buffer.size)
    failures = {int(row): str(message) for row, message in dict(about["failures"]).items()}
    return DecodedStore(buffer, index, failures, folder)


def _check(index: dict[str, np.ndarray], size: int) -> None:
    """Raises ValueError or KeyError unless every array of an index holds numbers and lies within `size` bytes: what it
    says becomes pointers into the buffer."""
    offset, shape, names = index["offset"], index["shape"], index["dtype"]
    if [array.dtype.kind for array in (offset, shape, names)] != ["i", "i", "U"]:
        raise ValueError("its index has other types")
    if not (offset.shape == names.shape == shape.shape[:1] and shape.ndim == 2):
        raise ValueError("its index has columns of different lengths")
    found, numbers = np.unique(names, return_inverse=True)
    kinds = [np.dtype(name) for name in found.tolist()]
    if wrong := [kind for kind in kinds if kind.kind not in "biufc"]:
        raise ValueError(f"it holds {wrong[0]}, no numbers")
    # In floats, which do not wrap around.
    bytes_ = np.array([kind.itemsize for kind in kinds], float)[numbers] * np.where(shape < 0, 1, shape).prod(1, float)
    if (offset < 0).any() or (offset + bytes_ > size).any():
        raise ValueError("an array of it lies outside of its data")


def _key(table: Table, modality: Modality, column: str, views: list[Any]) -> str:
    kind = type(modality)
    options = [modality.config.model_dump_json(), sorted({view.model_dump_json() for view in views})]
    files = [(path, table.file_state(path)) for path in table.paths(column)]
    code = [LAYOUT, version("openimp"), kind.__module__, kind.__qualname__]
    return stable_hash([code, table.fingerprint, column, options, files])
