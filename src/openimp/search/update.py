"""Brings the table of an index up to date with the media that it should hold."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from openimp.common.cache import stable_hash
from openimp.encoding.engine import ahead, to_cpu
from openimp.inference.model import Model
from openimp.search.folder import read_skipped, write_skipped
from openimp.search.media import Media, media_state
from openimp.search.parts import File, Part, list_parts, open_file, read_part
from openimp.search.table import FILTER_PATHS, Items, any_of

OPENED = 16
"""Number of files that a thread opens at a time."""


class Update:
    """One update of an index. `run` writes the table and counts, by kind, what was done."""

    def __init__(
        self,
        model: Model,
        folder: Path,
        items: Items,
        towards: dict[str, str],
        wanted: dict[str, Media],  # what the index should hold, by path
        given: list[Path] | None,  # only items in these files and folders are removed; None: all may be
    ) -> None:
        self.model, self.folder, self.items, self.towards = model, folder, items, towards
        self.wanted, self.stored = wanted, items.stored()
        self.path_of = {(known.sha256, known.modality): path for path, known in self.stored.items()}
        """The path whose rows hold the vectors of some content, by hash and modality."""
        self.first: dict[tuple[str, str], str] = {}
        """The path of the first source row with some content, by hash and modality. Later duplicates are left out."""
        roots = None if given is None else [os.path.abspath(path) for path in given]
        self.skipped = read_skipped(folder)
        stale = [path for path in self.skipped if self._is_stale(path, roots)]
        for path in stale:
            del self.skipped[path]
        self.saved = None if stale else dict(self.skipped)
        self.counts: Counter[str] = Counter()
        self.gone = {path for path in self.stored if path not in wanted and _is_below(path, roots)}
        self.moved: set[str] = set()  # the paths in `gone` whose content now has another path

    def run(self, batch_size: int, progress: Callable[[Iterable[Any], str], Iterable[Any]]) -> None:
        """Updates the table."""
        todo = [media for media in self.wanted.values() if not self._is_current(media)]
        current = self.wanted.keys() & self.stored.keys() - {media.path for media in todo}
        self.counts["unchanged"] = len(current)
        for path in current:
            if self.wanted[path].source:
                self.first[self.stored[path].sha256, self.stored[path].modality] = path
        for name in self.towards:
            if media := [media for media in todo if media.modality == name]:
                self._index(name, progress(media, f"index {name}"), batch_size)
        self.items.remove(self.gone)
        self.counts["removed"] = len(self.gone - self.moved)
        self._save_skipped()

    def _is_stale(self, path: str, roots: list[str] | None) -> bool:
        """Whether an entry of `skipped` is about a file that is gone, or about an earlier state of a file with rows.

        A kill after a file's rows are written leaves the latter.
        """
        stored = self.stored.get(path)
        outdated = stored is not None and stored.state != self.skipped[path][0]
        return outdated or (path not in self.wanted and _is_below(path, roots))

    def _is_current(self, media: Media) -> bool:
        stored, skipped = self.stored.get(media.path), self.skipped.get(media.path)
        if stored is not None:
            return (stored.state, stored.modality) == (media.state, media.modality)
        return skipped is not None and skipped[0] == media.state

    def _index(self, name: str, media: Iterable[Media], batch_size: int) -> None:
        started: list[File] = []
        copies: list[tuple[File, str]] = []  # files with the path of the same content in the table
        opened = chain.from_iterable(ahead(self._open, _batches(media)))
        encoder = self.model.item_encoder(name, self.towards[name], batch_size, f"index {name}")
        parts = self._parts(opened, started, copies)
        for chunk in to_cpu(encoder.encode((part, partial(read_part, encoder, part)) for part in parts)):
            for part, vector in chunk:
                part.file.add(part, vector)
            self._write(started, copies)
        self._write(started, copies)

    def _open(self, media: list[Media]) -> list[File]:
        return [open_file(self.model, self.path_of, each, self._known_hash(each)) for each in media]

    def _known_hash(self, media: Media) -> str:
        """The hash of a file if at most its text has changed, otherwise ""."""
        stored = self.stored.get(media.path)
        state = media_state(media.state)
        is_same = stored and state and not media.source and stored.modality == media.modality
        return stored.sha256 if stored and is_same and media_state(stored.state) == state else ""

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
                    list_parts(self.model, file)  # `open_file` found its content in rows that are replaced now.
                yield from file.parts
            if len(copies) == FILTER_PATHS:
                self._write(started, copies)

    def _write(self, started: list[File], copies: list[tuple[File, str]]) -> None:
        """Writes the files that are complete, and removes them from the lists."""
        done = [file for file in started if not file.unencoded]
        rows = [self._row(file, row, len(file.rows)) for file in done for row in file.rows]
        if copies:
            sources: dict[str, list[dict[str, Any]]] = {}
            for row in self.items.rows(any_of("path", {path for _, path in copies})):
                sources.setdefault(row["path"], []).append(row)
            rows += [self._row(file, row, len(sources[path])) for file, path in copies for row in sources[path]]
        done += [file for file, _ in copies]
        for file in done:
            if reason := file.error or file.text_error:
                self.skipped[file.media.path] = (file.media.state, reason)
            else:
                self.skipped.pop(file.media.path, None)
        replaced = self.stored.keys() & {file.media.path for file in done}
        if rows or replaced:
            self.items.replace(replaced, rows)
        for file in done:
            old = self.stored.get(file.media.path)
            if old and old.sha256 != file.sha256 and self.path_of.get((old.sha256, old.modality)) == file.media.path:
                del self.path_of[old.sha256, old.modality]
        self._save_skipped()
        self._count(done, {file.media.path: path for file, path in copies})
        started[:] = [file for file in started if file.unencoded]
        copies.clear()

    def _count(self, files: list[File], copied_from: dict[str, str]) -> None:
        for file in files:
            path = file.media.path
            source = copied_from.get(path)
            if not file.rows and source is None:
                continue  # It could not be read.
            if path in self.stored:
                self.counts["unchanged" if self.stored[path].sha256 == file.sha256 else "changed"] += 1
            elif source in self.gone:
                self.moved.add(source)
                self.counts["moved"] += 1
            else:
                self.counts["new"] += 1

    def _row(self, file: File, row: dict[str, Any], parts: int) -> dict[str, Any]:
        """A row of the table, from one of `File.rows` or from a row of the table with the same content."""
        media = file.media
        return {
            **{name: row[name] for name in ("part", "start", "end", "vector")},
            "id": stable_hash([media.path, row["part"]]),
            "path": media.path,
            "sha256": file.sha256,
            "state": media.state,
            "modality": media.modality,
            "towards": self.towards[media.modality],
            "parts": parts,
            "text": row["text"] if self.model.modalities[media.modality].reads_text else file.text,
            "media_type": file.media_type or row.get("media_type"),
            "source": media.source,
            "row": media.row,
            "column": media.column,
        }

    def _save_skipped(self) -> None:
        if self.skipped != self.saved:
            write_skipped(self.folder, self.skipped)
            self.saved = dict(self.skipped)


def _batches(media: Iterable[Media]) -> Iterator[list[Media]]:
    """A thread opens several files at a time, because handing a small one to a thread takes as long as hashing it."""
    rest = iter(media)
    while batch := list(islice(rest, OPENED)):
        yield batch


def _is_below(path: str, roots: list[str] | None) -> bool:
    return roots is None or any(path == root or path.startswith(root.rstrip(os.sep) + os.sep) for root in roots)
