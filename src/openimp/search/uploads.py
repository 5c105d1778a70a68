"""Files that users search with. Only their vectors and thumbnails are kept, for a limited time."""

import time
from collections import OrderedDict
from dataclasses import dataclass
from secrets import token_urlsafe
from threading import Lock

from openimp.search.query import EncodedQuery

MAX_UPLOAD_BYTES = 64 * 2**20
"""Bytes of a file at most."""
KEPT_UPLOADS = 256
"""Uploads that are kept at most; the oldest is dropped first."""
KEPT_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Upload:
    """An encoded file."""

    name: str
    encoded: EncodedQuery
    thumbnail: bytes | None  # WebP


class Uploads:
    """Uploads by random ids, so that nobody finds those of other users."""

    def __init__(self, kept: int = KEPT_UPLOADS, seconds: float = KEPT_SECONDS) -> None:
        self.kept = kept
        self.seconds = seconds
        self._uploads: OrderedDict[str, tuple[float, Upload]] = OrderedDict()
        self._lock = Lock()

    def add(self, upload: Upload) -> str:
        """Keeps an upload and returns its id."""
        id = token_urlsafe(12)
        with self._lock:
            self._uploads[id] = time.monotonic() + self.seconds, upload
            while len(self._uploads) > self.kept:
                self._uploads.popitem(last=False)
        return id

    def get(self, id: str) -> Upload | None:
        """An upload; None if it has expired or never existed."""
        with self._lock:
            expires, upload = self._uploads.get(id, (0.0, None))
            if upload and expires <= time.monotonic():
                del self._uploads[id]
                return None
            return upload
