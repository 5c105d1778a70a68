"""Which files of a folder are read: one rule for training, `init`, `embed` and `index`.

At every level below the folder, these are left out: hidden files and folders, whose names begin with a dot; folders
that are links; folders that may not be read; runs and indexes of openimp, which may lie among the data that they are
made of. A file that the user names is read even if it is hidden.
"""

import os
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

from openimp.common.errors import UserError

OWN_FOLDERS = ({"recipe.yaml", ".lock"}, {"recipe.yaml", "checkpoints"}, {"index.json", "items.lance"})
"""What a folder of openimp's own contains: a run, also one that has saved nothing yet, and an index."""


def visible(folder: str | Path) -> list[os.DirEntry[str]]:
    """The files and folders in a folder that are not hidden, sorted by name; none if the folder may not be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=attrgetter("name"))
    except PermissionError:
        return []


def subfolders(folder: str | Path) -> list[str]:
    """The names of the visible folders in a folder that have files, sorted."""
    folders = [entry for entry in visible(folder) if entry.is_dir(follow_symlinks=False)]
    return [entry.name for entry in folders if next(_files([entry]), None)]


def files_below(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """The files in a folder and its subfolders, in the order of their paths. A link to a file is a file.

    Only links need a system call of their own, so a hundred thousand files are listed in a fraction of a second.
    """
    return _files(visible(folder))


def _files(entries: list[os.DirEntry[str]]) -> Iterator[os.DirEntry[str]]:
    """The files among the entries of a folder, and below them."""
    stack = entries[::-1]
    while stack:
        entry = stack.pop()
        if entry.is_dir(follow_symlinks=False):
            if not _is_own(entry.path):
                stack += reversed(visible(entry.path))
        elif not is_folder(entry):
            yield entry


def _is_own(folder: str) -> bool:
    """Whether a folder is a run or an index."""
    return any(all(os.path.exists(os.path.join(folder, name)) for name in names) for names in OWN_FOLDERS)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one, or to what may not be read."""
    try:
        return entry.is_dir()
    except OSError:  # It leads to itself, or into a folder that may not be read.
        return True


def require_empty(folder: Path) -> None:
    """UserError unless the folder is empty or does not exist yet."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: expected a new or empty folder")


def is_hidden(path: str) -> bool:
    """Whether a part of a path, as file systems of URLs write it, is hidden."""
    return any(part.startswith(".") for part in path.split("/"))


def with_parents(path: str) -> Iterator[str]:
    """A path, and the folders that it is in."""
    parent = os.path.dirname(path)
    yield path
    while parent != path:
        path = parent
        yield path
        parent = os.path.dirname(path)
