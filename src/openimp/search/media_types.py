"""The media types that browsers may display, recognized by the first bytes of a file."""

import mimetypes
import statistics
from functools import cache
from pathlib import Path

from openimp.common.modality import Modality

UNKNOWN = "application/octet-stream"
HEAD = 16
"""Bytes at the start of a file that tell its type."""
# (offset, bytes, media type). {} is "audio" or "video": the containers hold either. A browser shows no other type, in
# particular neither SVG nor HTML, which may contain scripts.
SIGNATURES = (
    (0, b"\x89PNG\r\n\x1a\n", "image/png"),
    (0, b"\xff\xd8\xff", "image/jpeg"),
    (0, b"GIF8", "image/gif"),
    (8, b"WEBP", "image/webp"),
    (4, b"ftypavif", "image/avif"),
    (0, b"BM", "image/bmp"),
    (4, b"ftyp", "{}/mp4"),
    (0, b"\x1aE\xdf\xa3", "{}/webm"),
    (0, b"OggS", "{}/ogg"),
    (8, b"WAVE", "audio/wav"),
    (0, b"fLaC", "audio/flac"),
    (0, b"ID3", "audio/mpeg"),
    *((0, bytes([0xFF, second]), "audio/mpeg") for second in (0xFA, 0xFB, 0xF2, 0xF3)),
    *((0, bytes([0xFF, second]), "audio/aac") for second in (0xF0, 0xF1, 0xF8, 0xF9)),
)


def kind_of(modality: Modality) -> str:
    """How browsers display a modality: "text", or the main media type of most of its file extensions, or ""."""
    return "text" if modality.reads_text else _main_type(modality.extensions)


@cache
def _main_type(extensions: tuple[str, ...]) -> str:
    types = [mimetypes.guess_type(f"file{extension}")[0] for extension in extensions]
    main_types = [media_type.partition("/")[0] for media_type in types if media_type]
    return statistics.mode(main_types) if main_types else ""


def media_type(media: bytes | Path, kind: str) -> str:
    """The media type of a file or its content; `UNKNOWN` if browsers should not display it."""
    if isinstance(media, bytes):
        head = media[:HEAD]
    else:
        with media.open("rb") as file:
            head = file.read(HEAD)
    for offset, signature, type_template in SIGNATURES:
        if head[offset:].startswith(signature):
            if "{}" in type_template and kind == "image":
                return UNKNOWN  # A picture in such a container is in HEIC, which browsers do not show.
            return type_template.format("audio" if kind == "audio" else "video")
    return UNKNOWN
