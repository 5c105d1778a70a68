"""Digests of files. openimp's cache remembers them, so that unchanged files are not read again.

A file counts as unchanged while its `file_state` is the same: its size and times. A file that was modified in the last
two seconds is read each time. A digest is forgotten after `UNUSED_DAYS`.

The memory is one SQLite file, to which several processes may write. Where it cannot be read or written, files are read
again.
"""

import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from hashlib import sha256
from typing import NamedTuple

from openimp.common.cache import UNUSED_DAYS, cache_folder
from openimp.common.errors import UserError
from openimp.common.progress import Progress
from openimp.common.safe_files import file_state, state_of
from openimp.common.threads import map_ahead

COMPARED_BYTES = 2**30
"""Bytes that are read of a source to see whether it is the same as before."""
UNREADABLE = "unreadable"
"""Stands for the digest of a file that cannot be read."""
BLOCKS = 16
"""Blocks that are read of a file that is not read as a whole."""
CHUNK = 32
"""Files that a thread reads one after the other. A thread for each small file would take longer than reading it."""
ASKED = 500
"""Files that one query asks for. SQLite allows 999 values."""
SHOWN_BYTES = 2**30
"""Bytes to read from which on there is a progress bar."""
WAIT = 5.0
"""Seconds to wait for another process that writes digests."""
TABLE = """CREATE TABLE IF NOT EXISTS digests
    (path BLOB, most INTEGER, state TEXT, digest TEXT, day INTEGER, PRIMARY KEY (path, most)) WITHOUT ROWID"""


class _File(NamedTuple):
    path: str  # absolute
    most: int  # bytes that are read of it; 0: all
    size: int
    state: str  # `file_state`


def digests(
    files: Iterable[str | os.PathLike[str]],
    most: int | None = None,
    progress: Progress | None = None,
    description: str = "",
) -> list[str]:
    """The SHA-256 of each file's content, or `UNREADABLE`.

    Of a file with more than `most` bytes, it is that of its size and of `BLOCKS` blocks, `most` bytes together, which
    are spread evenly over the file, the first and the last among them. A change between the blocks that keeps the size
    is not noticed.
    """
    found = [_look_at(os.path.abspath(file), most) for file in files]
    present = [*dict.fromkeys(file for file in found if file)]
    known = _recall(present)
    unknown = [file for file in present if file not in known]
    chunks: Iterable[Sequence[_File]] = [unknown[start : start + CHUNK] for start in range(0, len(unknown), CHUNK)]
    if progress and sum(file.most or file.size for file in unknown) >= SHOWN_BYTES:
        chunks = progress(chunks, description)
    new: dict[_File, str] = {}
    try:
        for read in map_ahead(_read_all, chunks):
            new |= read
    finally:  # Also after Ctrl-C, which would otherwise cost all that was read.
        _remember(new)
    known |= new
    return [known[file] if file else UNREADABLE for file in found]


def _look_at(path: str, most: int | None) -> _File | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    size = status.st_size
    return _File(path, 0 if most is None or size <= most else most, size, state_of(status))


def _read_all(files: Sequence[_File]) -> dict[_File, str]:
    return {file: _read(file) for file in files}


def _read(file: _File) -> str:
    try:
        with open(file.path, "rb") as stream:
            if not file.most:
                digest = sha256()
                while content := stream.read(2**20):
                    digest.update(content)
                return digest.hexdigest()
            digest = sha256(str(file.size).encode())
            block = file.most // BLOCKS
            for number in range(BLOCKS):
                stream.seek(number * (file.size - block) // (BLOCKS - 1))
                digest.update(stream.read(block))
            return digest.hexdigest()
    except OSError:
        return UNREADABLE


def _recall(files: Sequence[_File]) -> dict[_File, str]:
    """The remembered digests of files that are unchanged."""
    known = {}

    def read(memory: sqlite3.Connection) -> None:
        oldest_day = _today() - UNUSED_DAYS
        for start in range(0, len(files), ASKED):
            asked = {(os.fsencode(file.path), file.most): file for file in files[start : start + ASKED]}
            paths = [*dict.fromkeys(path for path, _ in asked)]
            query = f"SELECT * FROM digests WHERE path IN ({', '.join('?' * len(paths))})"
            for path, most, state, digest, day in memory.execute(query, paths):
                file = asked.get((path, most))
                if file and file.state == state and day > oldest_day:
                    known[file] = digest

    _with_memory(read)
    return known


def _remember(digest_of: dict[_File, str]) -> None:
    """Stores digests, except of files that have changed since `_look_at`, and removes old ones."""
    rows = [
        (os.fsencode(file.path), file.most, file.state, digest, _today())
        for file, digest in digest_of.items()
        if digest != UNREADABLE and file.state == file_state(file.path)
    ]

    def write(memory: sqlite3.Connection) -> None:
        memory.execute("BEGIN IMMEDIATE")  # One transaction, because each waits for the disk.
        memory.execute(TABLE)
        memory.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?, ?)", rows)
        memory.execute("DELETE FROM digests WHERE day <= ?", (_today() - UNUSED_DAYS,))

    if rows:
        _with_memory(write)


def _with_memory(use: Callable[[sqlite3.Connection], None]) -> None:
    """Calls `use` with the memory in a transaction, and gives up if it is locked, full, read-only or damaged."""
    with suppress(sqlite3.OperationalError, OSError, UserError):  # UserError: the cache is another user's.
        file = cache_folder("digests") / "digests.sqlite"
        try:
            with closing(sqlite3.connect(file, timeout=WAIT)) as memory, memory:
                use(memory)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:  # It is damaged, and begins anew.
            file.unlink()


def _today() -> int:
    return int(time.time() // 86400)
