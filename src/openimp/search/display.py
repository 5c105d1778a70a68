"""How items are shown: their media types, by content, and the HTML element that displays them."""

import mimetypes
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from openimp.common.errors import UserError
from openimp.common.modality import Modality
from openimp.search.index import Index
from openimp.search.query import Hit

UNKNOWN = "application/octet-stream"
HEAD = 16
"""Bytes at the start of a file that tell its type."""
MAX_NAME = 200
"""Most characters of an item's name."""
# (offset, bytes, media type). {} is "audio" or "video": the containers hold either. A browser shows no other type, in
# particular neither SVG nor HTML, which may contain scripts.
SIGNATURES = (
    (0, b"\x89PNG\r\n\x1a\n", "image/png"),
    (0, b"\xff\xd8\xff", "image/jpeg"),
    (0, b"GIF8", "image/gif"),
    (8, b"WEBP", "image/webp"),
    (4, b"ftypavif", "image/avif"),
    (0, b"BM", "image/bmp"),
    (0, b"\0\0\1\0", "image/x-icon"),
    (4, b"ftyp", "{}/mp4"),
    (0, b"\x1aE\xdf\xa3", "{}/webm"),
    (0, b"OggS", "{}/ogg"),
    (8, b"WAVE", "audio/wav"),
    (0, b"fLaC", "audio/flac"),
    (0, b"ID3", "audio/mpeg"),
    (0, b"\xff\xfb", "audio/mpeg"),
    (0, b"\xff\xf3", "audio/mpeg"),
    (0, b"\xff\xf1", "audio/aac"),
)


def kind_of(modality: Modality) -> str:
    """What displays a modality: "text", or the main media type of its file extensions; "" if they have none."""
    if modality.reads_text:
        return "text"
    return _main_type(modality.extensions)


@cache
def _main_type(extensions: tuple[str, ...]) -> str:
    types = [mimetypes.guess_type(f"file{extension}")[0] for extension in extensions]
    common = Counter(found.partition("/")[0] for found in types if found).most_common(1)
    return common[0][0] if common else ""


def media_type(head: bytes, kind: str) -> str:
    """The media type of a file that begins with `head`; `UNKNOWN` if browsers should not display it."""
    for offset, signature, found in SIGNATURES:
        if head[offset:].startswith(signature):
            return found.format("audio" if kind == "audio" else "video")
    return UNKNOWN


def head_of(media: bytes | Path) -> bytes:
    """The first bytes of the media of an item; UserError if they cannot be read."""
    if isinstance(media, bytes):
        return media[:HEAD]
    try:
        with media.open("rb") as file:
            return file.read(HEAD)
    except OSError as error:
        raise UserError(f"{media.name}: {error.strerror}") from None


@dataclass(frozen=True)
class Item:
    """An item as the page shows it."""

    hit: Hit
    kind: str  # "text", "image", "animation", "video", "audio", or "" if browsers cannot display it
    problem: str = ""  # why there is nothing to display
    segments: int = 0  # of the file, if the item stands for all of them

    @property
    def name(self) -> str:
        """A short name: the text that belongs to the media, or the name of the file."""
        return Path(self.hit.path).name if self.kind == "text" or not self.hit.text else self.hit.text[:MAX_NAME]

    @property
    def media(self) -> str:
        """The URL of the file. A segment begins and ends at its times."""
        times = "" if self.hit.start is None else f"#t={self.hit.start:.2f},{self.hit.end:.2f}"
        return f"/media/{self.hit.id}{times}"

    @property
    def thumbnail(self) -> str:
        """The URL of a small picture."""
        return f"/thumbnails/{self.hit.id}"


def item(index: Index, hit: Hit) -> Item:
    """How a hit is shown, without reading its media or looking it up."""
    kind = kind_of(index.model.modalities[hit.modality])
    if kind == "text":
        return Item(hit, kind)
    try:
        index.check(hit)
    except UserError as error:
        return Item(hit, "", str(error))
    found = (hit.media_type or UNKNOWN).partition("/")[0]
    if found == "image" and kind == "video":
        return Item(hit, "animation")
    return Item(hit, found if found in ("image", "video", "audio") else "")
