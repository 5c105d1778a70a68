"""Atomic file replacement, cache folders that only this user can write to, and refusal of links out of a folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO

from openimp.errors import UserError


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `file`. When the block ends it replaces `file`; if the block fails it is removed.

    The temporary file has a random name, and opening it fails if that name exists, also as a link. So files and links
    that other users put into the folder cannot redirect the write. Its mode is that of any new file.
    """
    draft = file.with_name(f".{file.name}.{token_hex(8)}.tmp")
    with draft.open("xb") as stream:  # O_CREAT | O_EXCL does not follow links.
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
    """Writes `text` as UTF-8 to a new file that replaces `file`; see `replacing`."""
    with replacing(file) as draft:
        draft.write(text.encode("utf-8", errors))


def sync(path: Path) -> None:
    """Flushes a file or a folder to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder(name: str) -> Path:
    """Makes and returns a folder in openimp's cache.

    The cache is `$OPENIMP_CACHE` if that is set, else `openimp` in the user's cache folder.

    Raises:
        UserError: another user owns the folder or the cache.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openimp"
    return own_folder(own_folder(Path(os.environ.get("OPENIMP_CACHE") or cache)) / name)


def own_folder(folder: Path, variable: str = "OPENIMP_CACHE") -> Path:
    """Makes a folder that only this user can write to, and returns it.

    If the folder exists, this user must own it, and write permission for other users is removed from it.

    Args:
        folder: the path.
        variable: the environment variable that sets the path, for the error message.

    Raises:
        UserError: another user owns the folder.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # If it is a link, this user must own both the link and its target. Windows has no `getuid`.
    if hasattr(os, "getuid") and {folder.lstat().st_uid, folder.stat().st_uid} != {os.getuid()}:
        raise UserError(f"{folder}: belongs to another user; set {variable} to a folder of your own")
    mode = folder.stat().st_mode
    if mode & 0o022:
        folder.chmod(mode & 0o755)
    return folder


def refuse_links(folder: Path) -> None:
    """Refuses a run or a model's folder in which a file that openimp reads or writes is a link out of the folder.

    Otherwise a run made by somebody else could make openimp read or overwrite the user's own files. The files in the
    cache of the Hugging Face Hub are links; these may lead to the `blobs` folder of that cache.

    Raises:
        UserError: a link leads out of the folder.
    """
    real = Path(os.path.realpath(folder))
    allowed = [real, *([real.parents[1] / "blobs"] if real.parent.name == "snapshots" else [])]
    patterns = ("*", "tensorboard/*", "checkpoints/*", "checkpoints/step-*/*")
    for link in (path for pattern in patterns for path in folder.glob(pattern) if path.is_symlink()):
        if not any(Path(os.path.realpath(link)).is_relative_to(place) for place in allowed):
            raise UserError(f"{link}: is a link out of {folder}, which openimp does not follow; remove the link")
