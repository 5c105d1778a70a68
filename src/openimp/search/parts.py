"""Opens media that are indexed: hashes them, cuts them into parts, and reads the parts."""

import hashlib
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from openimp.common.errors import UserError
from openimp.common.modality import BadMedia
from openimp.common.protocols import Segmented, TextReader
from openimp.common.safe_files import sha256
from openimp.encoding.engine import ItemEncoder
from openimp.inference.files import file_text
from openimp.inference.model import Model
from openimp.search.display import head_of, kind_of, media_type
from openimp.search.media import Media

MAX_LINES = 100_000
"""Most lines of a text file, because all rows of a file are written to the table at once."""
MAX_TEXT = 10_000
"""Most characters of a line or a caption that are stored; no text encoder reads as many."""


@dataclass
class File:
    """A file, or the media in a row of a source, while it is indexed."""

    media: Media
    sha256: str = ""
    parts: list["Part"] = field(default_factory=list)
    unencoded: int = 0  # number of parts that are not encoded yet
    rows: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None  # why it, or its first unreadable part, cannot be read
    media_type: str | None = None
    text: str | None = None  # its caption or the text of its row
    text_error: str | None = None  # why the text cannot be read

    def add(self, part: "Part", vector: np.ndarray | BadMedia) -> None:
        """Adds the vector of a part, or the reason why there is none."""
        self.unencoded -= 1
        if isinstance(vector, BadMedia):
            self.error = self.error or f"{part.name}{vector}"
        else:
            self.rows.append({"part": part.number, "start": part.start, "end": part.end, "text": part.text,
                              "vector": vector})  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A whole file, a segment of a recording, or a line of a text file."""

    file: File
    number: int
    start: float | None = None
    end: float | None = None
    text: str | None = None

    @property
    def name(self) -> str:
        """The prefix of error messages about this part; empty for a whole file."""
        if self.end is not None:
            return f"from {self.start:.1f} to {self.end:.1f} s: "
        return "" if self.text is None else f"line {self.number + 1}: "


def open_file(model: Model, known: Container[tuple[str, str]], media: Media, sha256: str = "") -> File:
    """Reads the text of media, hashes them unless `sha256` is given, and lists their parts unless those are known.

    Known parts are those of a hash and modality in `known`.
    """
    file = File(media, sha256)
    try:
        file.text = (media.text() or "")[:MAX_TEXT] or None
    except BadMedia as error:
        file.text_error = str(error)
    try:
        if not sha256:
            file.sha256 = _hash(media.raw())
    except BadMedia as error:
        file.error = str(error)
    except OSError as error:
        file.error = error.strerror or str(error)
    if not file.error and (file.sha256, media.modality) not in known:
        list_parts(model, file)
    return file


def list_parts(model: Model, file: File) -> None:
    """Lists the parts of a file, or records why it cannot be read."""
    modality, view = model.modalities[file.media.modality], model.views[file.media.modality]
    try:
        raw = file.media.raw()
        if isinstance(raw, bytes | Path) and not modality.reads_text:
            file.media_type = media_type(head_of(raw), kind_of(modality))
        if modality.reads_text:
            assert isinstance(raw, Path)
            file.parts = [Part(file, i, text=line[:MAX_TEXT]) for i, line in enumerate(_lines(raw)) if line]
        elif isinstance(modality, Segmented) and (times := modality.segments(raw, view)):
            file.parts = [Part(file, i, start, end) for i, (start, end) in enumerate(times)]
        else:
            file.parts = [Part(file, 0)]
        file.unencoded = len(file.parts)
    except (BadMedia, UserError) as error:
        file.error = str(error)


def read_part(encoder: ItemEncoder, part: Part) -> np.ndarray:
    """The clips of a part, as `Modality.encode_input` makes them."""
    modality = encoder.modality
    if modality.reads_text:
        if isinstance(modality, TextReader) and not modality.knows(part.text, encoder.view):
            raise BadMedia("has no word that the model knows")
        return encoder.read(part.text)
    raw = part.file.media.raw()
    if isinstance(modality, Segmented) and part.start is not None and part.end is not None:
        return modality.encode_segment(raw, encoder.view, part.start, part.end)
    return encoder.read(raw)


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
