"""Opens media that are indexed: hashes them, cuts them into parts, and reads the parts.

A part is a whole file, a segment of a recording, or a line of a text file. Each part becomes a row of the table.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from openimp.common.modality import BadMedia, Modality
from openimp.common.protocols import Dated, Recorded, Segmented
from openimp.common.safe_files import sha256
from openimp.encoding.engine import ItemEncoder
from openimp.inference.files import file_text
from openimp.search.media import Media, media_state
from openimp.search.media_types import kind_of, media_type

MAX_LINES = 100_000
"""Maximum number of lines of a text file, because all rows of a file are written to the table at once."""
MAX_TEXT = 10_000
"""Maximum number of characters of a line or a caption that are stored; no text encoder reads as many."""

UNKNOWN_RECORDING = Recorded()


@dataclass
class IndexedFile:
    """A file, or the media in a row of a source, while it is indexed."""

    media: Media
    sha256: str
    text: str | None = None  # its caption, the text of its row, or the words of its name
    problem: str = ""  # why the file, its text or a part of it cannot be read
    recorded: Recorded = UNKNOWN_RECORDING  # when and where
    # Rows of the table, with "vector" once it is known. None: the part is found by its words only.
    parts: list[dict[str, Any]] = field(default_factory=list)


def text_of_all(media: Iterable[Media]) -> str | None:
    """The texts of several media, as far as they can be read, as one text."""
    texts: dict[str, None] = {}
    for medium in media:
        with suppress(BadMedia):
            texts[nfc(medium.text() or "")] = None
    return "; ".join(filter(None, texts))[:MAX_TEXT] or None


def open_file(encoder: ItemEncoder, media: Media, sha256: str) -> IndexedFile:
    """Reads the text of media, hashes them if `sha256` is empty, and lists their parts."""
    file = IndexedFile(media, sha256)
    try:
        file.text = media.text()
    except BadMedia as error:
        file.problem = str(error)
        file.media = replace(media, state=media_state(media.state))  # So the next update tries to read the text again.
    file.text = nfc(file.text or media.name_text() or "")[:MAX_TEXT] or None
    try:
        raw = media.raw()
        file.recorded = _recorded(encoder.modality, raw)
        file.sha256 = sha256 or _hash(raw)
        file.parts = _parts(encoder, raw, file.text)
    except OSError as error:
        file.problem = error.strerror or str(error)
    except BadMedia as error:
        file.problem = str(error)
    return file


def _parts(encoder: ItemEncoder, raw: bytes | Path | np.ndarray, text: str | None) -> list[dict[str, Any]]:
    modality = encoder.modality
    if modality.reads_text:
        assert isinstance(raw, Path)
        return [{"part": i, "text": nfc(line)[:MAX_TEXT]} for i, line in enumerate(_lines(raw)) if line]
    displayed_type = None if isinstance(raw, np.ndarray) else media_type(raw, kind_of(modality))
    segments = modality.segments(raw, encoder.view) if isinstance(modality, Segmented) else []
    return [
        {"part": i, "start": start, "end": end, "text": text, "media_type": displayed_type}
        for i, (start, end) in enumerate(segments or [(None, None)])
    ]


def read_part(encoder: ItemEncoder, file: IndexedFile, part: Mapping[str, Any]) -> np.ndarray:
    """The clips of a part, as `Modality.encode_input` makes them. BadMedia says which part cannot be read."""
    error_prefix = ""
    modality = encoder.modality
    try:
        if modality.reads_text:
            error_prefix = f"line {part['part'] + 1}: "
            return encoder.read_known(part["text"])
        if part["end"] is None or not isinstance(modality, Segmented):
            return encoder.read(file.media.raw())
        error_prefix = f"from {part['start']:.1f} to {part['end']:.1f} s: "
        return modality.encode_segment(file.media.raw(), encoder.view, part["start"], part["end"])
    except BadMedia as error:
        raise type(error)(f"{error_prefix}{error}") from None


def _recorded(modality: Modality, raw: bytes | Path | np.ndarray) -> Recorded:
    """When and where media were recorded. A file without a time of recording has the time of its last change."""
    recorded = UNKNOWN_RECORDING
    if isinstance(modality, Dated) and not isinstance(raw, np.ndarray):
        with suppress(BadMedia):  # Decoding will report a damaged file.
            recorded = modality.recorded(raw)
    if recorded.time is None and isinstance(raw, Path):
        with suppress(ValueError, OverflowError):  # A file system may hold times far outside of the calendar.
            recorded = recorded._replace(time=datetime.fromtimestamp(int(raw.stat().st_mtime)))
    return recorded


def nfc(text: str) -> str:
    """A text in Unicode's composed form (NFC). Names of files are often decomposed, and their words would be split."""
    return unicodedata.normalize("NFC", text)


def _lines(file: Path) -> list[str]:
    lines = [line.strip() for line in file_text(file).splitlines()]
    if len(lines) > MAX_LINES:
        raise BadMedia(f"{len(lines):,} lines are more than {MAX_LINES:,}; split the file")
    if not any(lines):
        raise BadMedia("contains no text")
    return lines


def _hash(raw: bytes | Path | np.ndarray) -> str:
    if isinstance(raw, Path):
        return sha256(raw)
    return hashlib.sha256(raw if isinstance(raw, bytes) else raw.tobytes()).hexdigest()
