"""The folders from which the media of an index may be read.

An index lists absolute paths, so an index that somebody else made may list any file of this machine, and its size and
modification time may be guessed. So `openimp index` records, in openimp's cache folder, which no other user can write
to, the folders that this user had indexed. The record is found by the random id of the index, not by its path, so an
index may be moved. Whoever copies the id into another index gains only these folders.
"""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from openimp.common.cache import cache_folder, stable_hash
from openimp.common.errors import UserError
from openimp.common.folders import with_parents
from openimp.common.safe_files import write_text

KIND = "indexed"
"""Folder in the cache, with a file per index."""


def recorded_folders(index_id: str) -> set[str]:
    """The real paths of files and folders that this user had indexed into an index."""
    with suppress(OSError, ValueError, UserError):  # Without a private cache folder, no index is known.
        return {path for path in json.loads(_record(index_id).read_text()) if isinstance(path, str)}
    return set()


def record_folders(index_id: str, folders: Iterable[str | Path], forgotten: Iterable[str | Path]) -> None:
    """Adds files and folders to those of an index, and removes others."""
    paths = recorded_folders(index_id) - {os.path.realpath(path) for path in forgotten}
    paths |= {os.path.realpath(path) for path in folders}
    with suppress(OSError, UserError):  # If it cannot be stored, `serve` only needs an option.
        write_text(_record(index_id), json.dumps(sorted(paths)))


def is_below(path: str, folders: set[str]) -> bool:
    """Whether a path is or lies below one of the real paths `folders`, once its links are resolved."""
    return os.path.isabs(path) and not folders.isdisjoint(with_parents(os.path.realpath(path)))


def _record(index_id: str) -> Path:
    return cache_folder(KIND) / stable_hash([index_id])
