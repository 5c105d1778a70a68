"""Brings the table of an index up to date with the media that it should hold."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from openimp.common.cache import stable_hash
from openimp.common.errors import counted
from openimp.common.folders import with_parents
from openimp.common.modality import BadMedia, UnknownText
from openimp.common.progress import Progress
from openimp.common.threads import map_ahead
from openimp.encoding.engine import ItemEncoder, chunks_on_cpu
from openimp.inference.model import Model
from openimp.search.media import Media, joined, media_state
from openimp.search.parts import IndexedFile, open_file, read_part, text_of_all
from openimp.search.table import Items, chunks

WRITTEN_BATCHES = 4
"""Files are embedded and written in groups with about this many batches of parts."""


class Update:
    """One update of an index. `run` writes the table, and counts new, changed, moved, unchanged and removed files."""

    def __init__(
        self,
        model: Model,
        items: Items,
        media: Iterable[Media],  # what the index should hold
        given: Sequence[Path] | None,  # only items in these files and folders are removed; None: only items of sources
        forget: Sequence[Path],  # all items in these files and folders are removed unless `media` has them
    ) -> None:
        self.model = model
        self.items = items
        self.wanted = _by_path(media)
        self.stored = items.stored()
        self._stored_below = Counter(parent for path in self.stored for parent in with_parents(path))
        wanted_below = {parent for path in self.wanted for parent in with_parents(path)}
        self.wanted_folders = {os.path.dirname(path) for path in self.wanted}
        forgotten = {os.path.abspath(path) for path in forget}
        named = {path: os.path.abspath(path) for path in given or ()}
        # Named paths without files and items. A text file that is a caption may be among them.
        self.unknown = [
            path for path, root in named.items() if root not in wanted_below and root not in self._stored_below
        ]
        without_files = self._stored_below.keys() - wanted_below - forgotten
        absent = {
            path: self._stored_below[root]
            for path, root in named.items()
            if root in without_files and not path.is_file() and not self._is_deleted_file(root)
        }
        # Unwanted items in these files and folders are removed. None: unwanted items of sources are removed.
        self.roots = None if given is None else forgotten | {named[path] for path in named.keys() - absent.keys()}
        # Folders that had files and have none now, and files that are gone, with the number of these files. Their items
        # are kept, because their disk may not be mounted. A folder does not count if a named folder around it still has
        # files.
        self.absent = {path: count for path, count in absent.items() if not self._is_below_roots(named[path])}
        # By hash and modality, the path of the first row of any source that has this content. Of later rows with it,
        # only the texts are indexed.
        self.first_row: dict[tuple[str, str], str] = {}
        self.duplicates: dict[str, list[Media]] = defaultdict(list)  # the later rows, by the path of the first
        self.gone = {path for path in self.stored if self._is_gone(path)}
        self.gone_hashes = Counter(self.stored[path].sha256 for path in self.gone)
        self.stored_hashes = {stored.sha256 for stored in self.stored.values()}
        self.skipped: dict[str, str] = {}  # by path, why a file, or a part of it, could not be read in this update
        self.counts: Counter[str] = Counter()

    def run(self, towards: dict[str, str], batch_size: int, progress: Progress) -> None:
        """Updates the table. For `towards` see `Metadata`."""
        outdated = defaultdict(list)  # media by modality
        for path, media in self.wanted.items():
            if not self._is_current(media):
                outdated[media.modality].append(media)
            else:
                self.counts["unchanged"] += 1
                if media.row is not None:
                    self.first_row[self.stored[path].sha256, media.modality] = path
        for name, media_of_modality in outdated.items():
            encoder = self.model.item_encoder(name, towards[name], batch_size, f"index {name}")
            progress_bar = iter(progress(media_of_modality, f"index {name}"))  # `_items` advances it by one per medium.
            for group in self._groups(encoder, media_of_modality, batch_size * WRITTEN_BATCHES):
                self._index(encoder, group, progress_bar)
            list(progress_bar)  # Ends it.
        self._add_texts_of_duplicates()
        self.items.remove(self.gone)
        self.counts["removed"] += len(self.gone) - self.counts["moved"]

    def has_items_in(self, path: Path) -> bool:
        """Whether the index has a file at this path or below it."""
        return os.path.abspath(path) in self._stored_below

    def _is_deleted_file(self, path: str) -> bool:
        """Whether a stored file is gone from a folder that still has other files, so that its disk is mounted."""
        return path in self.stored and any(Path(path).parent.glob("*"))

    def _is_below_roots(self, path: str) -> bool:
        return self.roots is not None and not self.roots.isdisjoint(with_parents(path))

    def _is_gone(self, path: str) -> bool:
        """Whether a stored path is not wanted any more, and this update may remove it."""
        if path in self.wanted:
            return False
        if self.roots is None:
            # A file of a source has none if its folder was indexed before by name.
            is_in_sources = os.path.dirname(path) in self.wanted_folders and not os.path.exists(path)
            return is_in_sources or self.stored[path].source is not None
        return self._is_below_roots(path)

    def _is_current(self, media: Media) -> bool:
        stored = self.stored.get(media.path)
        return stored is not None and (stored.state, stored.modality) == (media.state, media.modality)

    def _groups(self, encoder: ItemEncoder, media: list[Media], size: int) -> Iterator[list[IndexedFile]]:
        """Opens media, and yields groups with at most `size` files and about `size` parts: a film has thousands of
        parts."""
        group: list[IndexedFile] = []
        part_count = 0
        for file in map_ahead(partial(self._open, encoder), media):
            group.append(file)
            part_count += len(file.parts)
            if max(len(group), part_count) >= size:
                yield group
                group = []
                part_count = 0
        if group:
            yield group

    def _index(self, encoder: ItemEncoder, group: list[IndexedFile], progress_bar: Iterator[Any]) -> None:
        """Embeds the new content of a group of media, and replaces their rows."""
        files = []
        for file in group:
            if first := self._earlier_row(file):
                self.duplicates[first].append(file.media)
                if file.media.path in self.stored:
                    self.gone.add(file.media.path)
            else:
                files.append(file)
        self._copy_vectors(encoder, files)
        results = chunks_on_cpu(encoder.encode(_items(encoder, files, progress_bar)))
        unreadable_parts = Counter[str]()  # by path
        for (file, part), result in chain.from_iterable(results):
            if not isinstance(result, BadMedia):
                part["vector"] = result
                continue
            if isinstance(result, UnknownText):
                part["vector"] = None
            unreadable_parts[file.media.path] += 1
            file.problem = file.problem or str(result)
        for file in files:
            if (others := unreadable_parts[file.media.path] - 1) > 0:
                file.problem += f", and {counted(others, 'other part')} of the file"
        stored_paths = {file.media.path for file in files} & self.stored.keys()
        stored_texts = {row["path"]: row["text"] for row in self.items.rows("path", stored_paths, ["path", "text"])}
        self.items.replace(stored_paths, [row for file in files for row in _rows(file)])
        for file in files:
            self._record(file, stored_texts.get(file.media.path))

    def _open(self, encoder: ItemEncoder, media: Media) -> IndexedFile:
        stored = self.stored.get(media.path)
        known_hash = ""
        if stored and media_state(stored.state) == media_state(media.state):
            known_hash = stored.sha256  # Only the text of the media has changed.
        return open_file(encoder, media, known_hash)

    def _earlier_row(self, file: IndexedFile) -> str | None:
        """The path of an earlier row of a source with the same content. Without one, the file is the first with it."""
        if file.media.row is None or not file.sha256:
            return None
        first = self.first_row.setdefault((file.sha256, file.media.modality), file.media.path)
        return first if first != file.media.path else None

    def _add_texts_of_duplicates(self) -> None:
        """Gives the first of several rows with equal media the texts of all of them."""
        columns = self.items.table.schema.names
        for paths in chunks(self.duplicates.keys() & self.wanted.keys()):
            text_of = {path: text_of_all([self.wanted[path], *self.duplicates[path]]) for path in paths}
            rows = self.items.rows("path", paths, columns)
            changed = [row | {"text": text_of[row["path"]]} for row in rows if row["text"] != text_of[row["path"]]]
            self.items.replace({row["path"] for row in changed}, changed)

    def _copy_vectors(self, encoder: ItemEncoder, files: list[IndexedFile]) -> None:
        """Adds the vectors of parts whose content the table has. Parts that could not be read are read again."""
        stored_vectors = {}
        hashes = self.stored_hashes & {file.sha256 for file in files}
        for row in self.items.rows("sha256", hashes, ["sha256", "modality", "part", "start", "vector"]):
            if row["modality"] == encoder.modality.name:
                stored_vectors[row["sha256"], _place(row)] = row["vector"]
        for file in files:
            for part in file.parts:
                if vector := stored_vectors.get((file.sha256, _place(part))):
                    part["vector"] = vector

    def _record(self, file: IndexedFile, stored_text: str | None) -> None:
        """Counts a file of a group that was written, and remembers its content and its problem."""
        path = file.media.path
        if file.problem:
            self.skipped[path] = file.problem
        stored = self.stored.get(path)
        if not any("vector" in part for part in file.parts):  # The table has no rows of it.
            if stored:  # It could be read before.
                self.counts["removed"] += 1
            return
        self.stored_hashes.add(file.sha256)
        if stored:
            # A stored row of a source may also have the texts of later rows, so its texts are not compared.
            has_same_text = file.media.row is not None or file.text in (None, stored_text)
            self.counts["unchanged" if stored.sha256 == file.sha256 and has_same_text else "changed"] += 1
        elif self.gone_hashes[file.sha256]:
            self.gone_hashes[file.sha256] -= 1
            self.counts["moved"] += 1
        else:
            self.counts["new"] += 1


def _place(part: Mapping[str, Any]) -> float:
    """Where a part is in its file: its line or, of a recording, its start in seconds.

    Unreadable segments have no rows, so the stored numbers of the others differ.
    """
    start = part.get("start")
    return float(part["part"] if start is None else start)


def _by_path(media: Iterable[Media]) -> dict[str, Media]:
    """The media by path. A file that several rows name, with a caption each, has all the captions."""
    items: dict[str, list[Media]] = defaultdict(list)
    for item in media:
        items[item.path].append(item)
    return {path: joined(items_of_path) for path, items_of_path in items.items()}


def _items(encoder: ItemEncoder, files: list[IndexedFile], progress_bar: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
    """The parts that have no vector, as `ItemEncoder.encode` takes them."""
    for file in files:
        next(progress_bar, None)
        for part in file.parts:
            if "vector" not in part:
                yield (file, part), partial(read_part, encoder, file, part)


def _rows(file: IndexedFile) -> list[dict[str, Any]]:
    """The rows of a file in the table."""
    media = file.media
    parts = [part for part in file.parts if "vector" in part]
    if any(part.get("start") is not None for part in parts):
        # Readable segments are numbered from 0, because words are looked up in segment 0.
        parts = [part | {"part": number} for number, part in enumerate(parts)]
    if len(file.parts) == 1:  # Its only segment is all of it.
        parts = [part | {"start": None, "end": None} for part in parts]
    latitude, longitude = file.recorded.place or (None, None)
    of_file = {
        "path": media.path,
        "sha256": file.sha256,
        "state": media.state,
        "modality": media.modality,
        "parts": len(parts),
        "source": media.source,
        "row": media.row,
        "column": media.column,
        "date": file.recorded.time and file.recorded.time.isoformat(),
        "latitude": latitude,
        "longitude": longitude,
    }
    return [part | of_file | {"id": stable_hash([media.path, part["part"]])} for part in parts]
