"""Temporary files of the search page: uploads while they arrive, and media of rows while they are sent."""

import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.exceptions import HTTPException

MAX_BYTES = 2**30
"""Maximum number of bytes of all temporary files together."""


class TemporaryFiles:
    """A folder for files with at most `MAX_BYTES` bytes together. It is removed when the process ends."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="openimp-serve-")
        self.folder = self._folder.name
        self._reserved = 0
        self._lock = threading.Lock()

    @contextmanager
    def reservation(self) -> Iterator[Callable[[int], None]]:
        """A function to call before bytes are written. It raises HTTPException if there is no room for them.

        At the end, when the files must be gone, the room is free again.
        """
        bytes_here = 0

        def reserve(count: int) -> None:
            nonlocal bytes_here
            with self._lock:
                if self._reserved + count > MAX_BYTES:
                    raise HTTPException(503, "too many large files are sent at once; try again in a minute")
                self._reserved += count
                bytes_here += count

        try:
            yield reserve
        finally:
            with self._lock:
                self._reserved -= bytes_here
