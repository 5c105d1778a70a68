"""Files that users search with. Only their vectors and thumbnails are kept, for a limited time."""

import time
from dataclasses import dataclass
from secrets import token_urlsafe

from openimp.search.query import EncodedQuery

MAX_UPLOAD_BYTES = 64 * 2**20
"""Maximum size of a file in bytes."""
KEPT_UPLOADS = 256
"""Maximum number of uploads that are kept; the oldest is dropped first."""
KEPT_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Upload:
    """An encoded file."""

    name: str
    encoded: EncodedQuery
    thumbnail: bytes | None  # WebP


class Uploads:
    """Uploads by random ids, so that nobody finds those of other users. Only one thread may call `add`."""

    def __init__(self) -> None:
        self._uploads: dict[str, tuple[float, Upload]] = {}  # with the time when they expire, oldest first

    def add(self, upload: Upload) -> str:
        """Keeps an upload and returns its id."""
        id = token_urlsafe(12)
        self._uploads[id] = (time.monotonic() + KEPT_SECONDS, upload)
        if len(self._uploads) > KEPT_UPLOADS:
            del self._uploads[next(iter(self._uploads))]
        return id

    def get(self, id: str) -> Upload | None:
        """An upload; None if it has expired or never existed."""
        expires, upload = self._uploads.get(id, (0.0, None))
        return upload if expires > time.monotonic() else None
