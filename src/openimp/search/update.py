"""Brings the table of an index up to date with the media that it should hold."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from openimp.common.modality import BadMedia
from openimp.data.files import stable_hash
from openimp.encoding.items import ahead
from openimp.inference.files import encode_chunks, file_text
from openimp.inference.model import Model
from openimp.search.media import Media
from openimp.search.table import SOME, Items, any_of, read_skipped, write_skipped

MAX_LINES = 100_000
"""Most lines of a text file, because a file is written to the table at once."""

MAX_TEXT = 10_000
"""Most characters of a line that are stored; no text encoder reads as many."""


@dataclass
class File:
    """Media that are being indexed."""

    media: Media
    sha256: str = ""
    parts: list["Part"] = field(default_factory=list)
    left: int = 0  # number of parts that are not encoded yet
    rows: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None  # why it, or its first unreadable part, cannot be read

    def add(self, part: "Part", vector: np.ndarray | BadMedia) -> None:
        """Takes the vector of a part, or the reason why there is none."""
        self.left -= 1
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
        """How a message calls it."""
        if self.end is not None:
            return f"from {self.start:.1f} to {self.end:.1f} s: "
        return "" if self.text is None else f"line {self.number + 1}: "


class Update:
    """One update of an index. `run` writes the table and counts, by kind, what was done."""

    def __init__(
        self,
        model: Model,
        folder: Path,
        items: Items,
        towards: dict[str, str],
        wanted: dict[str, Media],  # by path
        given: list[Path] | None,  # only items in these files and folders are removed; None: all may be
    ) -> None:
        self.model, self.folder, self.items, self.towards = model, folder, items, towards
        self.wanted, self.stored = wanted, items.stored()
        self.path_of = {(known.sha256, known.modality): path for path, known in self.stored.items()}
        """Where the table has the vectors of some content. The key is a hash and a modality."""
        self.first: dict[tuple[str, str], str] = {}
        """The path of the first row of a source with some content. Rows with the same content are left out."""
        roots = None if given is None else [os.path.abspath(path) for path in given]
        self.old = [path for path in self.stored if _is_below(path, roots)]
        self.skipped = read_skipped(folder)
        stale = [path for path in self.skipped if path not in wanted and _is_below(path, roots)]
        for path in stale:
            del self.skipped[path]
        self.saved = None if stale else dict(self.skipped)
        self.counts: Counter[str] = Counter()
        self.gone = {path for path in self.old if path not in wanted}
        self.moved: set[str] = set()  # of `gone`: where media were that are now elsewhere

    def run(self, batch_size: int, progress: Callable[[Iterable[Any], str], Iterable[Any]]) -> bool:
        """Updates the table. Returns whether it changed."""
        todo = [media for media in self.wanted.values() if not self._is_current(media)]
        current = self.wanted.keys() & self.stored.keys() - {media.path for media in todo}
        self.counts["unchanged"] = len(current)
        for path in current:
            if self.wanted[path].source:
                self.first[self.stored[path].sha256, self.stored[path].modality] = path
        before = self.items.table.version
        for name in self.towards:
            if media := [media for media in todo if media.modality == name]:
                self._index(name, progress(media, f"index {name}"), batch_size)
        self.items.remove(self.gone)
        self.counts["removed"] = len(self.gone - self.moved)
        self._save_skipped()
        return bool(self.items.table.version != before)

    def _is_current(self, media: Media) -> bool:
        stored, skipped = self.stored.get(media.path), self.skipped.get(media.path)
        if stored is not None:
            return (stored.state, stored.modality) == (media.state, media.modality)
        return skipped is not None and skipped[0] == media.state

    def _index(self, name: str, media: Iterable[Media], batch_size: int) -> None:
        started: list[File] = []
        copies: list[tuple[File, str]] = []  # files with the path of the same content in the table
        parts = self._parts(ahead(self._open, media), started, copies)
        for chunk in encode_chunks(self.model, name, parts, self._read, self.towards[name], batch_size):
            for part, vector in chunk:
                part.file.add(part, vector)
            self._write(started, copies)
        self._write(started, copies)

    def _open(self, media: Media) -> File:
        """Hashes media, and lists their parts if they must be encoded. Runs in several threads."""
        file = File(media)
        try:
            file.sha256 = _sha256(media.raw())
        except BadMedia as error:
            file.error = str(error)
        except OSError as error:
            file.error = error.strerror or str(error)
        if not file.error and (file.sha256, media.modality) not in self.path_of:
            self._list_parts(file)
        return file

    def _list_parts(self, file: File) -> None:
        modality, view = self.model.modalities[file.media.modality], self.model.views[file.media.modality]
        try:
            raw = file.media.raw()
            if modality.reads_text:
                assert isinstance(raw, Path)
                file.parts = [Part(file, i, text=line[:MAX_TEXT]) for i, line in enumerate(_lines(raw)) if line]
            elif times := modality.segments(raw, view):
                file.parts = [Part(file, i, start, end) for i, (start, end) in enumerate(times)]
            else:
                file.parts = [Part(file, 0)]
            file.left = len(file.parts)
        except BadMedia as error:
            file.error = str(error)

    def _parts(self, files: Iterator[File], started: list[File], copies: list[tuple[File, str]]) -> Iterator[Part]:
        """The parts to encode. Sorts the files into those to encode, copies of known content, and duplicates."""
        for file in files:
            media, content = file.media, (file.sha256, file.media.modality)
            if media.source and not file.error and self.first.setdefault(content, media.path) != media.path:
                self.gone |= self.stored.keys() & {media.path}
                continue
            if not file.error and content in self.path_of:
                copies.append((file, self.path_of[content]))
            else:
                started.append(file)
                if not file.parts and not file.error:
                    self._list_parts(file)  # `_open` found its content in a row that was replaced since then.
                yield from file.parts
            if len(copies) == SOME:
                self._write(started, copies)

    def _read(self, part: Part) -> np.ndarray:
        media = part.file.media
        modality, view = self.model.modalities[media.modality], self.model.views[media.modality]
        if modality.reads_text:
            if not modality.knows(part.text, view):
                raise BadMedia("has no word that the model knows")
            return modality.encode_input(part.text, view)
        raw = media.raw()
        if part.start is None or part.end is None:
            return modality.encode_input(raw, view)
        return modality.encode_segment(raw, view, part.start, part.end)

    def _write(self, started: list[File], copies: list[tuple[File, str]]) -> None:
        """Writes the files that are complete, and removes them from the lists."""
        done = [file for file in started if not file.left]
        rows = [self._row(file, row) for file in done for row in file.rows]
        if copies:
            sources: dict[str, list[dict[str, Any]]] = {}
            for row in self.items.rows(any_of("path", {path for _, path in copies})):
                sources.setdefault(row["path"], []).append(row)
            rows += [self._row(file, row) for file, path in copies for row in sources[path]]
        done += [file for file, _ in copies]
        for file in done:
            if file.error:
                self.skipped[file.media.path] = (file.media.state, file.error)
            else:
                self.skipped.pop(file.media.path, None)
        replaced = self.stored.keys() & {file.media.path for file in done}
        if rows or replaced:
            self.items.replace(replaced, rows)
        for path in replaced:
            content = (self.stored[path].sha256, self.stored[path].modality)
            if self.path_of.get(content) == path:
                del self.path_of[content]
        self._save_skipped()
        self._count(done, {file.media.path: path for file, path in copies})
        started[:] = [file for file in started if file.left]
        copies.clear()

    def _count(self, files: list[File], copied_from: dict[str, str]) -> None:
        for file in files:
            path = file.media.path
            source = copied_from.get(path)
            if not file.rows and source is None:
                continue  # It could not be read.
            if path in self.stored:
                self.counts["unchanged" if source == path else "changed"] += 1
            elif source in self.gone:
                self.moved.add(source)
                self.counts["moved"] += 1
            else:
                self.counts["new"] += 1

    def _row(self, file: File, row: dict[str, Any]) -> dict[str, Any]:
        """A row of the table, from one of `File.rows` or from a row of the table with the same content."""
        media = file.media
        text = row["text"] if self.model.modalities[media.modality].reads_text else media.text()
        return {
            **{name: row[name] for name in ("part", "start", "end", "vector")},
            "id": stable_hash([media.path, row["part"]]),
            "path": media.path,
            "sha256": file.sha256,
            "state": media.state,
            "modality": media.modality,
            "towards": self.towards[media.modality],
            "text": text,
            "source": media.source,
            "row": media.row,
            "column": media.column,
        }

    def _save_skipped(self) -> None:
        if self.skipped != self.saved:
            write_skipped(self.folder, self.skipped)
            self.saved = dict(self.skipped)


def _lines(file: Path) -> list[str]:
    lines = [line.strip() for line in file_text(file).splitlines()]
    if len(lines) > MAX_LINES:
        raise BadMedia(f"{len(lines):,} lines are more than {MAX_LINES:,}; split the file")
    if not any(lines):
        raise BadMedia("contains no text")
    return lines


def _sha256(raw: bytes | Path | np.ndarray) -> str:
    if isinstance(raw, Path):
        with raw.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    return hashlib.sha256(raw if isinstance(raw, bytes) else raw.tobytes()).hexdigest()


def _is_below(path: str, roots: list[str] | None) -> bool:
    return roots is None or any(path == root or path.startswith(root.rstrip(os.sep) + os.sep) for root in roots)
