"""Folders of media as tables: one subfolder per class, or files without classes, both with or without captions."""

import os
import re
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from openimp.common.cache import stable_hash
from openimp.common.errors import UserError, counted
from openimp.common.folders import files_below, subfolders
from openimp.common.modality import BadMedia
from openimp.common.progress import notice
from openimp.common.safe_files import read_text
from openimp.data.files import inside, is_utf8
from openimp.data.tables import Table, Unreadable

CAPTION = ".txt"
"""Extension of captions: `a.txt` beside `a.jpg` is its caption."""
PREFIX_END = re.compile(r"(?<=.)[-_. ]")
"""Separates the first part of a file's name from the others."""
MAX_CAPTION = 2**20
"""Largest size of a caption's file in bytes."""


def open_folder(name: str, path: str) -> Table:
    """Opens a folder with one subfolder per class, or one with files and no subfolders.

    The columns are `file` (relative path), `label` (subfolder) or, without subfolders, `prefix` (the first part of the
    name: `cat` of cat.12.jpg, `7` of 7_theo_3.wav), `name` (stem) and `extension` (lower case, without the dot), and
    `text`, the content of the caption, if any file has one. `common/folders.py` says which files are read.
    `datasets` is not used, because it would guess the files' types and copy their names into its cache.
    """
    if not os.path.isdir(path):
        raise UserError(f"source {name}: {path} is not a folder")
    os.scandir(path).close()  # Raises OSError if it may not be read. Unreadable folders below it are skipped.
    root = Path(os.path.abspath(path))  # Absolute, because paths below Path(".") would not begin with it.
    classes = subfolders(root)
    start = len(os.path.join(root, ""))
    sizes = {}  # in bytes, by path relative to `root`
    unreadable_names = []
    for entry in chain.from_iterable(files_below(root / folder) for folder in classes or [""]):
        relative_path = entry.path[start:].replace(os.sep, "/")
        if is_utf8(relative_path):
            sizes[relative_path] = entry.stat(follow_symlinks=False).st_size
        else:
            unreadable_names.append(relative_path)
    if unreadable_names:
        first = ascii(unreadable_names[0])
        files = counted(len(unreadable_names), "file")
        notice(f"source {name}: skipped {files} with a name that is not UTF-8; the first: {first}")
    if not classes and not sizes:
        raise UserError(
            f"source {name}: {path} has no subfolders and no files; a folder source has files, or one subfolder per "
            "class, and links to folders are not followed"
        )
    split_names = {file: os.path.splitext(file) for file in sizes}
    texts = {stem: file for file, (stem, extension) in split_names.items() if extension.lower() == CAPTION}
    media_stems = {stem for stem, extension in split_names.values() if extension.lower() != CAPTION}
    captions = {stem: file for stem, file in texts.items() if stem in media_stems}
    media = {file: parts for file, parts in split_names.items() if captions.get(parts[0]) != file}
    columns: dict[str, list[Any]] = {"file": [*media]}
    if classes:
        columns["label"] = [file.split("/", 1)[0] for file in media]
    columns["name"] = [os.path.basename(stem) for stem, _ in media.values()]
    if not classes:
        columns["prefix"] = [PREFIX_END.split(name, maxsplit=1)[0] for name in columns["name"]]
    columns["extension"] = [extension[1:].lower() for _, extension in media.values()]
    if captions:
        columns["text"] = [captions.get(stem) for stem, _ in media.values()]
    data = pa.table({column: pa.array(values, pa.string()) for column, values in columns.items()})
    readers = {"text": partial(_read_caption, root)} if captions else {}
    return Table(name, path, data, partial(str, stable_hash(sizes.items())), root, label="file", text_functions=readers)


def _read_caption(root: Path, path: str | None) -> str | Unreadable | None:
    if path is None:
        return None
    try:
        return read_text(inside(root, path), MAX_CAPTION).removeprefix("\ufeff").strip()
    except UnicodeDecodeError:
        return Unreadable(f"caption {path} is not UTF-8 text; save it as UTF-8")
    except (BadMedia, OSError, UserError) as error:
        return Unreadable(f"caption {path}: {error}")
