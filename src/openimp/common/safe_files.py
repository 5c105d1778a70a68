"""Atomic replacement of files and folders, folders that only this user can write to, and refusal of links."""

import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO

from openimp.common.errors import UserError
from openimp.common.names import Name


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `file`. When the block ends it replaces `file`; if the block fails it is removed.

    The temporary file has a random name, and opening it fails if that name exists, also as a link. So files and links
    that other users put into the folder cannot redirect the write. Its mode is that of any new file. If the
    process is killed, the temporary file stays.
    """
    draft = _new_draft(file)
    stream = draft.open("xb")  # O_CREAT | O_EXCL does not follow links.
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, file)  # Windows does not rename open files.
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync(file.parent)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Makes an empty folder beside `folder`, which it replaces when the block ends; if it fails, it is removed."""
    draft = _new_draft(folder)
    draft.mkdir()
    try:
        yield draft
        for file in (*draft.rglob("*"), draft):
            sync(file)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    sync(folder.parent)


def _new_draft(path: Path) -> Path:
    """A random name for a new file or folder beside `path`."""
    return path.with_name(f".{path.name}.{token_hex(8)}.tmp")


RECENT = 2.0
"""Seconds after its modification in which a file may be modified again without another `file_state`: the resolution of
the times of FAT, the coarsest of the usual file systems."""


def file_state(file: str | Path) -> str:
    """A text that changes with a file: its size, its modification time, and the time of its last change of status (also
    by `touch`, which sets the other back). Empty if there is no such file.

    Of a file that was modified in the last `RECENT` seconds, each call returns another text, because the file may be
    modified again within the same tick of the file system's clock. git calls this problem "racy".
    """
    try:
        return state_of(os.stat(file))
    except OSError:
        return ""


def state_of(status: os.stat_result) -> str:
    """`file_state` of a file with this status."""
    now = time.time_ns()
    is_recent = abs(now - status.st_mtime_ns) < RECENT * 1e9
    return f"{status.st_size}-{status.st_mtime_ns}+{f'recent{now}' if is_recent else status.st_ctime_ns}"


def has_state(file: str | Path, state: str) -> bool:
    """Whether a file has the size and the modification time of a `file_state`."""
    found = file_state(file)
    return bool(found) and found.partition("+")[0] == state.partition("+")[0]


def write_text(file: Path, text: str, errors: str = "strict") -> None:
    """Writes `text` as UTF-8 to a new file that replaces `file`; see `replacing`."""
    with replacing(file) as draft:
        draft.write(text.encode("utf-8", errors))


def sha256(file: str | Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flushes a file or a folder to disk (fsync)."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders, and syncs only files that are open for writing.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def private_folder(folder: Path, variable: str = "OPENIMP_CACHE") -> Path:
    """Makes a folder that only this user can write to, with the parents that are missing, and returns it.

    If the folder exists, this user must own it, and others must not have been able to put anything into it. `variable`
    is the environment variable that sets the path, for the error message.
    """
    if not folder.parent.exists():
        private_folder(folder.parent, variable)
    folder.mkdir(mode=0o700, exist_ok=True)
    # If it is a link, this user must own both the link and its target.
    if not (_is_own(folder.lstat()) and _is_own(folder.stat())):
        raise UserError(f"{folder}: belongs to another user; set {variable} to a folder of your own")
    if os.name != "nt" and folder.stat().st_mode & 0o022:
        raise UserError(
            f"{folder}: other users can write to it, so what it holds cannot be trusted; remove it, or set {variable} "
            "to a folder of your own"
        )
    return folder


def _is_own(status: os.stat_result) -> bool:
    return not hasattr(os, "getuid") or status.st_uid == os.getuid()  # Windows has no `getuid`.


RUN_FILES = (
    "*",
    "model/*",
    "ema/*",
    "tensorboard/*",
    "checkpoints/*",
    "checkpoints/*step-*/*",
    "checkpoints/*step-*/*/*",
)
"""Patterns of the files in a run or a model's folder that openimp reads or writes."""


def refuse_links(folder: Path, patterns: Iterable[str] = RUN_FILES) -> None:
    """Refuses a folder in which a file that openimp reads or writes is a link out of it, or a pipe.

    `patterns` finds these files. Otherwise a run or a model made by somebody else could make openimp read or overwrite
    the user's own files, or wait for ever. The files in the cache of the Hugging Face Hub are links; these may lead to
    the `blobs` folder of that cache.
    """
    real_folder = Path(os.path.realpath(folder))
    allowed = [real_folder]
    if real_folder.parent.name == "snapshots":
        allowed.append(real_folder.parents[1] / "blobs")
    for pattern in patterns:
        for path in folder.glob(pattern):
            target = Path(os.path.realpath(path))
            if not any(target.is_relative_to(allowed_folder) for allowed_folder in allowed):
                raise UserError(f"{path}: is a link out of {folder}, which openimp does not follow; remove the link")
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise UserError(f"{path}: is not a regular file")


def local_folder(name: str) -> Path | None:
    """The folder of a model that is named SCHEME:FOLDER or SCHEME:local-dir:FOLDER, and None for any other name.

    UserError if there is no such folder, or `refuse_links` refuses a link in it.
    """
    path = Name.parse(name).folder
    if path is None:
        return None
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{name}: no such folder")
    refuse_links(folder, ("**/*",))
    return folder


CONVERT = "; docs/fine-tuning.md (Models that are refused) has the line that converts others"
"""What a message about pickled weights ends with."""


def require_safetensors(folder: Path, preferred: Sequence[str]) -> None:
    """Refuses a folder from which a library might read weights of another format than safetensors.

    `preferred` are the files that the library reads rather than any other.
    """
    safe_files = sorted(file.name for file in folder.glob("*.safetensors"))
    if not safe_files:
        raise UserError(
            f"{folder}: has no weights in a .safetensors file, the only kind that is read of a folder{CONVERT}"
        )
    other_files = sorted(file.name for file in folder.glob("*") if file.suffix in (".bin", ".pth", ".tar"))
    if other_files and not {*preferred} & {*safe_files}:
        safe_file = safe_files[0]
        raise UserError(
            f"{folder}: {other_files[0]} may be preferred to {safe_file}; rename {safe_file} to {preferred[0]}"
        )


LARGEST_TEXT = 2**26
"""Maximum size in bytes of a file with a configuration or a tokenizer. The tokenizer of SigLIP 2 has 34 MB."""


def read_text(file: Path, limit: int = LARGEST_TEXT) -> str:
    """The text of a small file that may come from a stranger, in UTF-8.

    A file that cannot be read is an OSError or a UnicodeDecodeError. A pipe or a device, which might never end, and a
    file of more than `limit` bytes are UserErrors.
    """
    if not stat.S_ISREG(file.stat().st_mode):
        raise UserError(f"{file}: is not a regular file")
    with file.open("rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{file}: is larger than {limit:,} bytes, the most that is read of such a file")
    return data.decode()


def read_required(file: Path) -> str:
    """`read_text`, with a UserError if the file is missing or damaged."""
    try:
        return read_text(file)
    except FileNotFoundError:
        raise UserError(f"{file}: missing") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: damaged: {error}") from None


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a small file that may come from a stranger; UserError if it is missing or damaged."""
    try:
        data = json.loads(read_required(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{file}: damaged: expected a JSON object")
    return data
