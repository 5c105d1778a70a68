"""Brings the table of an index up to date with the media that it should hold."""

import errno
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from openimp.common.cache import stable_hash
from openimp.common.errors import counted
from openimp.common.modality import BadMedia, UnknownText
from openimp.common.progress import Progress
from openimp.common.safe_files import write_text
from openimp.common.threads import map_ahead
from openimp.common.versions import library_version
from openimp.encoding.engine import ItemEncoder, chunks_on_cpu
from openimp.inference.model import Model
from openimp.search.folder import SKIPPED, Skipped, read_skipped
from openimp.search.media import Media, joined, media_state
from openimp.search.parts import IndexedFile, open_file, read_part
from openimp.search.table import Items

WRITTEN_BATCHES = 4
"""Files are embedded and written in groups with about this many batches of parts."""


class Update:
    """One update of an index. `run` writes the table, and counts new, changed, moved, unchanged and removed files."""

    def __init__(
        self,
        model: Model,
        folder: Path,
        items: Items,
        media: Iterable[Media],  # what the index should hold
        given: Sequence[Path] | None,  # only items in these files and folders are removed; None: only items of sources
        forget: Sequence[Path],  # all items in these files and folders are removed unless `media` has them
    ) -> None:
        self.model = model
        self.folder = folder
        self.items = items
        self.wanted = _by_path(media)
        self.stored = items.stored()
        # What was in a folder that has no files now is kept: its disk may not be mounted.
        forgotten = {_below(path) for path in forget}
        self.absent = {
            path: count for path in given or () if _below(path) not in forgotten and (count := self._lost_items(path))
        }
        self.roots: tuple[str, ...] | None = None
        if given is not None:
            self.roots = (*forgotten, *(_below(path) for path in given if path not in self.absent))
            # A folder without files may be in another one that has some.
            self.absent = {path: n for path, n in self.absent.items() if not _below(path).startswith(self.roots)}
        # By `IndexedFile.content`, the path of the first row of any source that has this content. Later rows with it
        # are duplicates, and left out.
        self.first_row: dict[tuple[str, str], str] = {}
        self.gone = {path for path in self.stored if self._is_gone(path)}
        self.moved: set[str] = set()  # the paths in `gone` whose content now has another path
        skipped = read_skipped(folder)
        self.skipped = dict(skipped.files)
        # The versions with which all skipped files were tried. An interrupted update has not tried all of them again.
        self.tried_with = skipped.decoders if skipped.files else _decoder_versions(model)
        self.to_retry: set[str] = set()  # stored files with parts that an older version of a decoder could not read
        if skipped.decoders != _decoder_versions(model):
            self.skipped = {path: skip for path, skip in skipped.files.items() if path in self.stored}
            self.to_retry = set(self.skipped)
        # The path of an indexed file with the same content, by `IndexedFile.content`. A file with unreadable parts is
        # left out and read again, so that its problem is reported under each of the file's names.
        self.path_of = {
            (stored.sha256, stored.modality): path for path, stored in self.stored.items() if path not in self.skipped
        }
        self.part_counts = {path: stored.parts for path, stored in self.stored.items()}
        self.counts: Counter[str] = Counter()

    def run(self, towards: dict[str, str], batch_size: int, progress: Progress) -> None:
        """Updates the table. For `towards` see `Metadata`."""
        for path, (state, _) in list(self.skipped.items()):
            # If a process was killed after it wrote the rows of a file, skipped.json has the file's earlier state.
            if self._is_gone(path) or (path in self.stored and self.stored[path].state != state):
                del self.skipped[path]
        outdated = defaultdict(list)  # media by modality
        for path, media in self.wanted.items():
            if not self._is_current(media):
                outdated[media.modality].append(media)
            elif path in self.stored:
                self.counts["unchanged"] += 1
                if media.row is not None:
                    self.first_row[self.stored[path].sha256, media.modality] = path
        for name, media_of_modality in outdated.items():
            encoder = self.model.item_encoder(name, towards[name], batch_size, f"index {name}")
            progress_bar = iter(progress(media_of_modality, f"index {name}"))  # `_items` advances it by one per medium.
            for group in self._groups(encoder, media_of_modality, batch_size * WRITTEN_BATCHES):
                self._index(encoder, group, progress_bar)
            list(progress_bar)  # Ends it.
        self.items.remove(self.gone)
        self.counts["removed"] = len(self.gone - self.moved)
        self.tried_with = _decoder_versions(self.model)
        self._write_skipped()

    def has_items_in(self, path: Path) -> bool:
        """Whether a file, or a file in a folder, was indexed before."""
        return any(os.path.join(stored, "").startswith(_below(path)) for stored in self.stored)

    def _lost_items(self, folder: Path) -> int:
        """The number of files in a folder that were indexed before, if it has none now; else 0."""
        if folder.is_file():  # Thousands of files may be named, and each scan of all paths takes time.
            return 0
        root = _below(folder)
        if any(path.startswith(root) for path in self.wanted):
            return 0
        return sum(path.startswith(root) for path in self.stored)

    def _is_gone(self, path: str) -> bool:
        """Whether a stored or skipped path is not wanted any more, and this update may remove it.

        Without roots, it may remove paths of sources, and skipped paths without rows.
        """
        if path in self.wanted:
            return False
        if self.roots is None:
            return path not in self.stored or self.stored[path].source is not None
        return os.path.join(path, "").startswith(self.roots)

    def _is_current(self, media: Media) -> bool:
        if media.path in self.to_retry:
            return False
        if stored := self.stored.get(media.path):
            return (stored.state, stored.modality) == (media.state, media.modality)
        if media.path not in self.skipped:
            return False
        state, reason = self.skipped[media.path]
        # Opening a file that is forbidden costs nothing, and permissions are no part of its state.
        return state == media.state and reason != os.strerror(errno.EACCES)

    def _groups(self, encoder: ItemEncoder, media: list[Media], size: int) -> Iterator[list[IndexedFile]]:
        """Opens media, and yields groups with at most `size` files and about `size` parts: a film has thousands."""
        group: list[IndexedFile] = []
        part_count = 0
        for file in map_ahead(partial(self._open, encoder), media):
            if file.copied_from != self.path_of.get(file.content, ""):
                # Files are opened ahead. Since then, an earlier group has replaced the rows to copy, or was written
                # with the same content.
                file = self._open(encoder, file.media, file.sha256)
            group.append(file)
            part_count += self.part_counts.get(file.copied_from, len(file.parts))
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
            if self._is_duplicate(file):
                if file.media.path in self.stored:
                    self.gone.add(file.media.path)
            else:
                files.append(file)
        self._copy_parts(encoder, files)
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
        paths = {file.media.path for file in files}
        self.items.replace(paths & self.stored.keys(), [row for file in files for row in _rows(file)])
        skipped_before = dict(self.skipped)
        for file in files:
            self._record(file)
        if self.skipped != skipped_before:
            self._write_skipped()

    def _open(self, encoder: ItemEncoder, media: Media, sha256: str = "") -> IndexedFile:
        stored = self.stored.get(media.path)
        if stored and media_state(stored.state) == media_state(media.state):
            sha256 = stored.sha256  # Only the text of the media has changed.
        return open_file(encoder, self.path_of, media, sha256)

    def _is_duplicate(self, file: IndexedFile) -> bool:
        """Whether an earlier row of a source has the same content. If not, the file becomes the first with it."""
        if file.media.row is None or not file.sha256:
            return False
        return self.first_row.setdefault(file.content, file.media.path) != file.media.path

    def _copy_parts(self, encoder: ItemEncoder, files: list[IndexedFile]) -> None:
        """Adds the parts of files whose content the table has."""
        parts_of = defaultdict(list)
        columns = ["path", "part", "start", "end", "text", "media_type", "vector"]
        for row in self.items.rows("path", {file.copied_from for file in files if file.copied_from}, columns):
            parts_of[row["path"]].append(row)
        for file in files:
            # Equal media may have other captions, but the lines of a text file are its content.
            text = {} if encoder.modality.reads_text else {"text": file.text}
            file.parts += [row | text for row in parts_of[file.copied_from]]

    def _record(self, file: IndexedFile) -> None:
        """Counts a file of a group that was written, and remembers its content and its problem."""
        path = file.media.path
        self.skipped.pop(path, None)
        if file.problem:
            self.skipped[path] = (file.media.state, file.problem)
        stored = self.stored.get(path)
        if stored and self.path_of.get((stored.sha256, stored.modality)) == path:
            del self.path_of[stored.sha256, stored.modality]
        if not any("vector" in part for part in file.parts):
            return  # The table has no rows of it.
        self.part_counts[path] = len(file.parts)
        if not file.problem:
            self.path_of[file.content] = path
        if stored:
            self.counts["unchanged" if stored.sha256 == file.sha256 else "changed"] += 1
        elif file.copied_from in self.gone:
            self.moved.add(file.copied_from)
            self.counts["moved"] += 1
        else:
            self.counts["new"] += 1

    def _write_skipped(self) -> None:
        skipped = Skipped(decoders=self.tried_with, files=self.skipped)
        write_text(self.folder / SKIPPED, skipped.model_dump_json(indent=1))


def _below(path: Path) -> str:
    """What the paths of the files in a folder begin with."""
    return os.path.join(os.path.abspath(path), "")


def _decoder_versions(model: Model) -> dict[str, str]:
    """The version of each package that reads files."""
    packages = {"pillow-heif", *(package for modality in model.modalities.values() for package in modality.decoders)}
    return {package: library_version(package) or "" for package in sorted(packages)}


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
    parts = sorted((part for part in file.parts if "vector" in part), key=lambda part: int(part["part"]))
    if any(part.get("start") is not None for part in parts):
        # Readable segments are counted, because words are looked up in segment 0.
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
