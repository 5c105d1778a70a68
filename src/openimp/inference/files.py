"""Finds and reads media files, for `openimp embed` and `openimp index`."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import fsspec

from openimp.common.errors import UserError, nearest
from openimp.common.folders import files_below, is_hidden
from openimp.common.modality import BadMedia, Modalities
from openimp.common.names import is_url
from openimp.common.safe_files import LARGEST_TEXT, read_text

File = Path | str
"""A path on disk, or a URL that fsspec opens, such as `s3://bucket/photos/1.jpg`."""
LARGEST_DOWNLOAD = 2**31
"""Most bytes of a media file at a URL, because it is read into memory."""


def find_files(
    files: Iterable[File], modalities: Modalities, only: str | None = None, hint: str = ""
) -> tuple[dict[str, list[File]], dict[str, int]]:
    """Returns the files by modality, and the number of files in folders that belong to none, by extension.

    `files` are files and folders, on disk or at URLs. If two modalities share an extension, it belongs to the model's
    first one. `only` is the modality of all files; None: their extensions decide. `hint` is what the user can do if the
    extension of a given file does not tell.
    """
    if only is not None and only not in modalities:
        raise UserError(f"the model has no modality {only!r}{nearest(only, modalities)}")
    wanted = [only] if only else list(modalities)
    modality_of = {extension: name for name in reversed(wanted) for extension in modalities[name].extensions}
    found: dict[str, list[File]] = {}
    given: list[File] = [str(file) if is_url(str(file)) else Path(file) for file in files]
    unknown = Counter[str]()
    for file in given:
        inner = _files_in(file)
        for each in [file] if inner is None else inner:
            ending = os.path.splitext(each)[1].lower()
            name = modality_of.get(ending)
            if inner is None:
                name = only or name
                if name is None:
                    kinds = " or ".join(modalities)
                    reason = f"the model reads no {ending} files, only" if ending else "no extension says whether it is"
                    raise UserError(f"{file}: {reason} {kinds}{hint}")
            if name:
                found.setdefault(name, []).append(Path(each) if isinstance(file, Path) else str(each))
            else:
                unknown[ending] += 1
    if not found:
        where = ", ".join(map(str, given)) or "an empty list"
        raise UserError(f"no files to embed in {where}; looked for {', '.join(modality_of)}")
    return {name: list(dict.fromkeys(paths)) for name, paths in found.items()}, unknown


def _files_in(file: File) -> Iterator[str] | None:
    """The paths of the files in a folder and its subfolders, sorted; see `common/folders.py`. None if `file` is a
    file."""
    if isinstance(file, Path):
        if not file.exists():
            raise UserError(f"{file}: no such file or folder")
        return (entry.path for entry in files_below(file)) if file.is_dir() else None
    try:
        system, path = fsspec.core.url_to_fs(file)
        inner = sorted(system.find(path))
    except Exception as error:  # Each file system raises its own errors.
        raise UserError(f"{file}: {str(error).strip() or type(error).__name__}") from None
    if not inner:
        raise UserError(f"{file}: no such file or folder")
    if inner == [path]:
        return None
    return (system.unstrip_protocol(each) for each in inner if not is_hidden(each.removeprefix(path)))


def file_value(file: File, reads_text: bool) -> str | bytes | Path:
    """What a modality decodes: the text of a file, its path, or its bytes if it is at a URL.

    Raises BadMedia if there is no such file, it is too large, or it is not a text in UTF-8. If the network fails, the
    error is that of the file system, because it is not the file's fault.
    """
    if isinstance(file, Path):
        return file_text(file).strip() if reads_text else file
    limit = LARGEST_TEXT if reads_text else LARGEST_DOWNLOAD
    try:
        system, path = fsspec.core.url_to_fs(file)
        with system.open(path, "rb") as stream:
            data: bytes = stream.read(limit + 1)
        if len(data) > limit:
            raise BadMedia(f"is larger than {limit:,} bytes")
        return data.decode().strip() if reads_text else data
    except (FileNotFoundError, PermissionError) as error:
        raise BadMedia("no such file" if isinstance(error, FileNotFoundError) else "access is denied") from None
    except UnicodeDecodeError as error:
        raise BadMedia(f"no UTF-8 text: {error}") from None


def file_text(path: Path) -> str:
    """The text of a file; BadMedia if it cannot be read."""
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError, UserError) as error:
        raise BadMedia(f"no UTF-8 text: {error}") from None


def shown_name(path: File) -> str:
    """A path as text. Bytes of its name that are not UTF-8 are escaped."""
    return str(path).encode(errors="backslashreplace").decode()
