"""Folders of media as tables: one subfolder per class, or files without classes, both with or without captions."""

import os
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from openimp.common.cache import stable_hash
from openimp.common.errors import UserError
from openimp.common.folders import files_below, subfolders
from openimp.common.modality import BadMedia
from openimp.common.safe_files import read_text
from openimp.data.files import inside, is_utf8
from openimp.data.tables import Table, Unreadable

CAPTION = ".txt"
"""Extension of captions: `a.txt` beside `a.jpg` is its caption."""
MAX_CAPTION = 2**20
"""Largest size of a caption's file in bytes."""


class FolderTable(Table):
    """Files of a folder. The data has the path of each caption, and the column `text` its content."""

    @property
    def converted(self) -> set[str]:
        return {"text"} & {*self.columns}

    def _column(self, column: str, rows: Sequence[int]) -> list[Any]:
        values = super()._column(column, rows)
        return [self._read(path) for path in values] if column == "text" else values

    def _read(self, path: str | None) -> str | Unreadable | None:
        if path is None:
            return None
        assert self.root is not None
        try:
            return read_text(inside(self.root, path), MAX_CAPTION).removeprefix("\ufeff").strip()
        except (BadMedia, OSError, UnicodeDecodeError, UserError) as error:
            return Unreadable(f"caption {path}: {error}")


def open_folder(name: str, path: str, root: Path) -> FolderTable:
    """Opens a folder with one subfolder per class, or one with files and no subfolders.

    The columns are `file` (relative path), `label` (subfolder), `name` (stem) and `extension` (lower case, without the
    dot), and `text`, the content of the caption, if any file has one. `common/folders.py` says which files are read.
    `datasets` is not used, because it would guess the files' types and copy their names into its cache.
    """
    import pyarrow as pa

    if not root.is_dir() or not Path(path).is_dir():
        raise UserError(f"source {name}: {path} is not a folder")
    os.scandir(root).close()  # Raises OSError if it may not be read. Of folders below it, only the readable ones count.
    root = Path(os.path.abspath(root))  # Paths begin with it: below Path("."), they would not.
    classes = subfolders(root)
    start = len(os.path.join(root, ""))
    entries = chain.from_iterable(files_below(root / folder) for folder in classes or [""])
    # Path relative to `root` and size in bytes.
    sizes = [(entry.path[start:].replace(os.sep, "/"), entry.stat(follow_symlinks=False).st_size) for entry in entries]
    if not classes and not sizes:
        raise UserError(
            f"source {name}: {path} has no subfolders and no files; a folder source has files, or one subfolder per "
            "class, and links to folders are not followed"
        )
    for file, _ in sizes:
        if not is_utf8(file):
            raise UserError(f"source {name}: {path}: the name of {file!r} is not UTF-8; rename it")
    captions = _captions(file for file, _ in sizes)
    not_media = set(captions.values())
    files = [file for file, _ in sizes if file not in not_media]
    split = [os.path.splitext(file) for file in files]
    columns = {
        "file": files,
        "label": [file.split("/", 1)[0] for file in files] if classes else None,
        "name": [os.path.basename(stem) for stem, _ in split],
        "extension": [extension[1:].lower() for _, extension in split],
        "text": [captions.get(stem) for stem, _ in split] if captions else None,
    }
    arrays = {column: pa.array(values, pa.string()) for column, values in columns.items() if values is not None}
    content = partial(str, stable_hash(sizes))
    return FolderTable(name, path, pa.table(arrays), content, root, label="file")


def _captions(files: Iterable[str]) -> dict[str, str]:
    """The caption of each file that has one: {path without extension: path of the caption}."""
    split = [os.path.splitext(file) for file in files]
    media = {stem for stem, extension in split if extension.lower() != CAPTION}
    return {stem: stem + extension for stem, extension in split if extension.lower() == CAPTION and stem in media}
