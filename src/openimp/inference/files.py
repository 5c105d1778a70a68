"""Finds and reads media files, for `openimp embed`, `index` and `classify`."""

import os
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import fsspec
import numpy as np

from openimp.common.errors import UserError, by_extension, counted, escaped, nearest, one_line
from openimp.common.folders import files_below, is_hidden
from openimp.common.modality import BadMedia, Modalities, Modality
from openimp.common.names import is_url
from openimp.common.safe_files import read_text
from openimp.encoding.engine import ItemEncoder, chunks_on_cpu

File = Path | str
"""A path on disk, or a URL that fsspec opens, such as `s3://bucket/photos/1.jpg`."""

MAX_LISTED = 10
"""Maximum number of files or rows with a problem that are listed."""


def find_files(
    files: Iterable[File],
    modalities: Modalities,
    only: str | None = None,
    hint: str = "",
    required: bool = True,
) -> tuple[dict[str, list[File]], dict[str, int]]:
    """Returns the files by modality, and the number of files in folders that belong to none, by extension.

    `files` are files and folders, on disk or at URLs. `only` is the modality of the given files, and in folders the
    only one that is read. None: the extensions decide; see `modality_by_extension`. `hint` tells the user what to do if
    the extension of a given file does not decide. UserError if there are no files of the modalities, unless `required`
    is false.
    """
    if only is not None and only not in modalities:
        raise UserError(f"the model has no modality {only!r}{nearest(only, modalities)}")
    modality_of = modality_by_extension(modalities)
    if only is not None:
        modality_of = {extension: name for extension, name in modality_of.items() if name == only}
    # The keys of each inner dictionary are the files, each once.
    files_by_modality: dict[str, dict[File, None]] = {}
    given = [str(file) if is_url(str(file)) else Path(file).expanduser() for file in files]
    unknown = Counter[str]()
    for file in given:
        files_in_folder = _files_in(file, None if only else modality_of)
        for path in [file] if files_in_folder is None else files_in_folder:
            extension = os.path.splitext(path)[1].lower()
            name = modality_of.get(extension)
            if files_in_folder is None:
                name = only or name
            if name is not None:
                files_by_modality.setdefault(name, {})[path] = None
            elif files_in_folder is not None:
                unknown[extension] += 1
            else:
                reason = (
                    f"the model reads no {extension} files, only" if extension else "no extension says whether it is"
                )
                raise UserError(f"{file}: {reason} {' or '.join(modalities)}{hint}")
    if required and not files_by_modality:
        places = ", ".join(map(str, given)) or "an empty list"
        others = f" of the kinds that are read, only {by_extension(unknown)}" if unknown else ""
        raise UserError(f"no files in {places}{others}; looked for {', '.join(modality_of)}")
    return {name: list(unique_files) for name, unique_files in files_by_modality.items()}, unknown


def modality_by_extension(modalities: Mapping[str, Modality]) -> dict[str, str]:
    """The modality that reads the files of each extension. If several can, it is the first one."""
    modality_of: dict[str, str] = {}
    for name, modality in modalities.items():
        for extension in modality.extensions:
            modality_of.setdefault(extension, name)
    for name, modality in modalities.items():
        for extension in modality.other_extensions:
            modality_of.setdefault(extension, name)
    return modality_of


def _files_in(file: File, extensions: Container[str] | None) -> Iterator[File] | None:
    """The paths of the files in a folder and its subfolders, sorted; see `common/folders.py`. None for a file.

    A URL that ends with one of `extensions` is looked up as a file first, and then as a folder. None: all extensions.
    """
    if isinstance(file, Path):
        if not file.exists():
            raise UserError(f"{file}: no such file or folder")
        return (Path(entry.path) for entry in files_below(file)) if file.is_dir() else None
    try:
        system, path = fsspec.core.url_to_fs(file)
        # Over HTTP, `find` would download the file, and `isfile` takes a folder for one.
        extension = os.path.splitext(path)[1].lower()
        if extension and (extensions is None or extension in extensions) and system.isfile(path):
            return None
        paths = sorted(system.find(path))
    except Exception as error:  # Each file system raises its own errors.
        raise UserError(f"{file}: {str(error).strip() or type(error).__name__}") from None
    if not paths:
        raise UserError(f"{file}: no such file or folder")
    if paths == [path]:
        return None
    return (system.unstrip_protocol(inner) for inner in paths if not is_hidden(inner.removeprefix(path)))


def encoded(encoder: ItemEncoder, files: Iterable[File], skipped: list[str]) -> Iterator[dict[File, np.ndarray]]:
    """Yields the vectors of files, a group at a time. `skipped` gets "path: reason" of each unreadable file."""

    def read(file: File) -> np.ndarray:
        return encoder.read_known(_value(file, encoder.modality.reads_text))

    for group in chunks_on_cpu(encoder.encode((file, partial(read, file)) for file in files)):
        skipped += [f"{shown_name(file)}: {result}" for file, result in group if isinstance(result, BadMedia)]
        yield {file: result for file, result in group if isinstance(result, np.ndarray)}


def _value(file: File, reads_text: bool) -> str | bytes | Path:
    """The value that a modality decodes: the text of a file, its path, or its bytes if it is at a URL.

    BadMedia if a file at a URL cannot be read, or if a text is not in UTF-8.
    """
    if isinstance(file, Path):
        return file_text(file).strip() if reads_text else file
    try:
        with fsspec.open(file) as stream:
            data = stream.read()
        return data.decode("utf-8-sig").strip() if reads_text else data
    except Exception as error:  # Each file system raises its own errors. One file must not end the embedding of others.
        raise BadMedia(f"cannot be read: {type(error).__name__}: {one_line(error)}") from None


def file_text(path: Path) -> str:
    """The text of a file, without a byte order mark; BadMedia if it cannot be read."""
    try:
        return read_text(path).removeprefix("\ufeff")
    except (OSError, UnicodeDecodeError, UserError) as error:
        raise BadMedia(f"no UTF-8 text: {error}") from None


def shown_name(path: File) -> str:
    """A path as text. Bytes of its name that are not UTF-8 are escaped."""
    return str(path).encode(errors="backslashreplace").decode()


def listed(items: Sequence[str], heading: str) -> list[str]:
    """Lines with the first of the items below a heading; none if there are no items."""
    more = [f"  and {len(items) - MAX_LISTED:,} more"] if len(items) > MAX_LISTED else []
    return [heading, *(f"  {item}" for item in items[:MAX_LISTED]), *more] if items else []


def left_out(skipped: list[str], unknown: Mapping[str, int]) -> list[str]:
    """Lines about files that were not fully read: "path: reason", and about files of no modality, by extension."""
    lines = listed(skipped, f"{counted(len(skipped), 'file')} could not be read, or not completely:")
    if unknown:
        lines.append(f"skipped files in folders, of other kinds than are read: {by_extension(unknown)}")
    return [escaped(line) for line in lines]


def parquet_file(out: str | Path) -> Path:
    """The table to write. UserError if its name does not say so, because names decide how files are read."""
    if is_url(str(out)) or Path(out).suffix.lower() != ".parquet" or Path(out).is_dir():
        raise UserError(f"{out}: name a file on disk that ends with .parquet")
    return Path(out).expanduser()
