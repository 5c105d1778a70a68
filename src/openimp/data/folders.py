"""Folders of media as tables: one subfolder per class, or files without classes, both with or without captions."""

import os
import re
from functools import partial
from itertools import chain
from pathlib import Path

import pyarrow as pa

from openimp.common.cache import stable_hash
from openimp.common.digests import digests
from openimp.common.errors import UserError, counted
from openimp.common.folders import files_below, subfolders
from openimp.common.modality import BadMedia
from openimp.common.progress import notice
from openimp.common.safe_files import read_text
from openimp.data.files import inside, is_utf8
from openimp.data.tables import Table, Unreadable, evenly_spaced

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
    sizes = _file_sizes(name, root, classes)
    if not classes and not sizes:
        raise UserError(
            f"source {name}: {path} has no subfolders and no files; a folder source has files, or one subfolder per "
            "class, and links to folders are not followed"
        )
    caption_of_stem = {}  # by path without extension
    media_stems = set()
    for file in sizes:
        stem, extension = os.path.splitext(file)
        if extension.lower() == CAPTION:
            caption_of_stem[stem] = file
        else:
            media_stems.add(stem)
    group = "label" if classes else "prefix"
    columns: dict[str, list[str | None]] = {"file": [], group: [], "name": [], "extension": [], "text": []}
    for file in sizes:
        stem, extension = os.path.splitext(file)
        caption = caption_of_stem.get(stem) if stem in media_stems else None
        if file == caption:
            continue
        file_name = os.path.basename(stem)
        columns["file"].append(file)
        columns[group].append(file.split("/", 1)[0] if classes else PREFIX_END.split(file_name, maxsplit=1)[0])
        columns["name"].append(file_name)
        columns["extension"].append(extension[1:].lower())
        columns["text"].append(caption)
    has_captions = any(columns["text"])
    if not has_captions:
        del columns["text"]
    data = pa.table({column: pa.array(values, pa.string()) for column, values in columns.items()})
    readers = {"text": partial(_read_caption, root)} if has_captions else {}
    content = partial(_content, root, stable_hash(sizes.items()), data)
    return Table(name, path, data, content, root, label="file", text_functions=readers)


def _content(root: Path, names_and_sizes: str, data: pa.Table, whole: bool) -> str:
    """Hash of the files' names and sizes, and of the captions: all or, unless `whole`, up to `MAX_CHECKED_FILES`."""
    captions = data["text"].drop_null().to_pylist() if "text" in data.column_names else []
    checked = captions if whole else evenly_spaced(captions)
    return stable_hash([names_and_sizes, *digests([root / caption for caption in checked], MAX_CAPTION)])


def _file_sizes(name: str, root: Path, classes: list[str]) -> dict[str, int]:
    """The size of each file in the folders of `classes`, or in `root` if there are none, by path relative to `root`."""
    start = len(os.path.join(root, ""))
    sizes = {}
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
    return sizes


def _read_caption(root: Path, path: str | None) -> str | Unreadable | None:
    if path is None:
        return None
    try:
        return read_text(inside(root, path), MAX_CAPTION).removeprefix("\ufeff").strip()
    except UnicodeDecodeError:
        return Unreadable(f"caption {path} is not UTF-8 text; save it as UTF-8")
    except (BadMedia, OSError, UserError) as error:
        return Unreadable(f"caption {path}: {error}")
