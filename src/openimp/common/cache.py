"""openimp's cache. Each entry is a folder, `$OPENIMP_CACHE/KIND/KEY`, whose content can be made again.

An entry is made by one process while others wait for its lock. It is made again if it cannot be read. Entries that
nothing has read for `UNUSED_DAYS` are removed when another of their kind is made.
"""

import errno
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from openimp.common.errors import UserError
from openimp.common.safe_files import private_folder, replacing_folder

log = logging.getLogger(__name__)
UNUSED_DAYS = 60
READ_ERRORS = (OSError, ValueError, TypeError, LookupError, NotImplementedError, UserError)
"""Errors of libraries when they read a file that is damaged or that another version has written."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors that only writing can raise: the disk or the user's share of it is full, or it is read-only."""
UNWRITABLE = (*FULL, errno.EACCES, errno.EPERM)
"""Errors of a lock in a folder to which this process cannot write."""
T = TypeVar("T")


class CacheError(UserError):
    """The cache cannot be written."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"{_cache()}: openimp's cache cannot be written: {reason}; make room, or set OPENIMP_CACHE to "
            "another folder"
        )


def stable_hash(parts: Iterable[Any]) -> str:
    """Hash of the `repr` of each value, 32 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode() + b"\n")
    return digest.hexdigest()[:32]


def cache_folder(kind: str) -> Path:
    """Makes and returns a `private_folder` in openimp's cache.

    The cache is `$OPENIMP_CACHE` if that is set, else `openimp` in the user's cache folder.
    """
    try:
        return private_folder(private_folder(_cache()) / kind)
    except OSError as error:
        raise CacheError(os.strerror(error.errno or 0)) from None


def _cache() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openimp"
    return Path(os.environ.get("OPENIMP_CACHE") or default)


@contextmanager
def _full_as_cache_error() -> Iterator[None]:
    """Converts errors of `FULL` to a CacheError, so that no caller reports data that cannot be read."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error  # `datasets` wraps what a user can fix.
        if isinstance(cause, OSError) and cause.errno in FULL:
            raise CacheError(os.strerror(cause.errno)) from None
        raise


def is_cached(kind: str, key: str) -> bool:
    """Whether there is such an entry. It may be damaged."""
    return (cache_folder(kind) / key).exists()


@_full_as_cache_error()
def cached(kind: str, key: str, read: Callable[[Path], T], write: Callable[[Path], None]) -> T:
    """What `read` returns for the folder of an entry. If there is none, `write` fills an empty folder first.

    If `read` raises one of `READ_ERRORS`, the entry is damaged or out of date, and is made again. If the cache is
    read-only or its disk is full, entries are only read, and another one is a CacheError.
    """
    entry = cache_folder(kind) / key
    try:
        lock = FileLock(f"{entry}.lock").acquire()  # The file stays, because another process may be about to lock it.
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        with suppress(*READ_ERRORS):
            return read(entry)
        raise CacheError(os.strerror(error.errno)) from None
    with lock:
        if entry.exists():
            os.utime(entry)  # Before it is read, so that no other process removes it meanwhile.
            try:
                return read(entry)
            except READ_ERRORS as error:
                log.info("%s is made again: %s", entry, error)
        _remove_unused(entry.parent)
        for draft in entry.parent.glob(f".{key}.*.tmp"):  # A process that was killed has left it.
            shutil.rmtree(draft)
        with replacing_folder(entry) as draft:
            write(draft)
        return read(entry)


def _remove_unused(folder: Path) -> None:
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    for entry in folder.iterdir():
        with suppress(OSError, Timeout):  # Timeout: another process uses the entry.
            if not entry.is_dir() or entry.stat().st_mtime >= oldest:
                continue
            with FileLock(f"{entry}.lock", timeout=0):
                if entry.stat().st_mtime < oldest:
                    shutil.rmtree(entry)
