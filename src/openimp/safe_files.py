"""Files that are replaced whole, cache folders that no other user controls, and links that lead out of a folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO

from openimp.errors import UserError


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """Opens a draft beside `file`, which takes its place when the block ends, and is removed if the block fails.

    The draft's name is random, and opening it fails if anything is there already, a link included, so nothing that
    others put into the folder decides what is overwritten. It has the mode of any new file.
    """
    draft = file.with_name(f".{file.name}.{token_hex(8)}.tmp")
    with draft.open("xb") as stream:  # O_CREAT and O_EXCL, which follow no link
        try:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(draft, file)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    sync(file.parent)


def write_text(file: Path, text: str, errors: str = "strict") -> None:
    """Writes or replaces a whole file of UTF-8, as `replacing` does."""
    with replacing(file) as draft:
        draft.write(text.encode("utf-8", errors))


def sync(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder(name: str) -> Path:
    """A folder of openimp's cache, which is `$OPENIMP_CACHE`, else `openimp` in the user's cache folder.

    Raises:
        UserError: another user owns it.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openimp"
    return own_folder(own_folder(Path(os.environ.get("OPENIMP_CACHE") or cache)) / name)


def own_folder(folder: Path, variable: str = "OPENIMP_CACHE") -> Path:
    """Makes a folder for this user alone; one that is there already must be the user's, and loses others' right to
    write into it. `variable` is what decides where it is.

    Raises:
        UserError: another user owns it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Of a link, both it and where it leads count. Windows has no such owners.
    if hasattr(os, "getuid") and {folder.lstat().st_uid, folder.stat().st_uid} != {os.getuid()}:
        raise UserError(f"{folder}: belongs to another user; set {variable} to a folder of your own")
    mode = folder.stat().st_mode
    if mode & 0o022:
        folder.chmod(mode & 0o755)
    return folder


def refuse_links(folder: Path) -> None:
    """Checks what openimp reads and writes of a run or a model's folder for links that lead out of it.

    A run from somebody else could hold a link in place of any file, and so have files of the user read or written. In
    the cache of the Hugging Face hub, whose files are links, they may lead to its `blobs`.

    Raises:
        UserError: there is one.
    """
    real = Path(os.path.realpath(folder))
    allowed = [real, *([real.parents[1] / "blobs"] if real.parent.name == "snapshots" else [])]
    patterns = ("*", "tensorboard/*", "checkpoints/*", "checkpoints/step-*/*")
    for link in (path for pattern in patterns for path in folder.glob(pattern) if path.is_symlink()):
        if not any(Path(os.path.realpath(link)).is_relative_to(place) for place in allowed):
            raise UserError(f"{link}: is a link out of {folder}, which openimp does not follow; remove it")
