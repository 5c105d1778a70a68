"""Finds media files and encodes them in chunks, for `openimp embed` and `openimp index`."""

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from openimp.common.errors import UserError, nearest
from openimp.common.modality import BadMedia, Modalities
from openimp.common.safe_files import read_text
from openimp.encoding.items import ahead, embed
from openimp.inference.model import Model

T = TypeVar("T")
CHUNK = 512
"""Number of items whose embeddings are handed on together."""


def find_files(
    files: Iterable[str | Path], modalities: Modalities, only: str | None = None, hint: str = ""
) -> tuple[dict[str, list[Path]], int]:
    """Returns the files by modality, and the number of files in folders that belong to none.

    If two modalities share an extension, it belongs to the model's first one. `only` is the modality of all files;
    None: their extensions decide. `hint` is what the user can do if the extension of a given file does not tell.
    """
    if only is not None and only not in modalities:
        raise UserError(f"the model has no modality {only!r}{nearest(only, modalities)}")
    wanted = [only] if only else list(modalities)
    modality_of = {extension: name for name in reversed(wanted) for extension in modalities[name].extensions}
    found: dict[str, list[Path]] = {}
    unknown, given = 0, [Path(file) for file in files]
    for path in given:
        if path.is_dir():
            for inner in sorted(_files_below(path)):
                name = modality_of.get(inner.suffix.lower())
                unknown += name is None
                if name:
                    found.setdefault(name, []).append(inner)
        elif not path.exists():
            raise UserError(f"{path}: no such file or folder")
        else:
            name = only or modality_of.get(path.suffix.lower())
            if name is None:
                kinds = " or ".join(modalities)
                raise UserError(f"{path}: its extension does not say whether it is {kinds}{hint}")
            found.setdefault(name, []).append(path)
    if not found:
        where = ", ".join(map(str, given)) or "an empty list"
        raise UserError(f"no files to embed in {where}; looked for {', '.join(modality_of)}")
    return {name: list(dict.fromkeys(paths)) for name, paths in found.items()}, unknown


def _files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder. Linked folders, and folders that may not be read, are left out."""
    # Unlike Path.rglob, os.scandir needs no system call per file to tell files from folders.
    try:
        with os.scandir(folder) as found:
            entries = list(found)
    except PermissionError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _files_below(folder / entry.name)
        elif entry.is_file():
            yield folder / entry.name


def encode_chunks(
    model: Model, name: str, items: Iterable[T], read: Callable[[T], np.ndarray], towards: str, batch_size: int
) -> Iterator[list[tuple[T, np.ndarray | BadMedia]]]:
    """Yields items of the modality `name`, in order, with their unit vectors (Z,) fp32, or why they cannot be read.

    `read` makes the clips of an item, as `Modality.encode_input` does, in several threads.
    """
    chunk: list[tuple[T, BadMedia | None]] = []

    def attempt(item: T) -> tuple[T, np.ndarray | BadMedia]:
        try:
            return item, read(item)
        except BadMedia as error:
            return item, error

    def readable() -> Iterator[np.ndarray]:
        for item, found in ahead(attempt, items):
            if isinstance(found, BadMedia):
                chunk.append((item, found))
            else:
                chunk.append((item, None))
                yield found

    clips = readable()
    while True:
        modality, view = model.modalities[name], model.views[name]
        vectors = embed(model.imp, modality, view, islice(clips, CHUNK), towards, batch_size, model.precision)
        if not chunk:
            return
        rows = iter(vectors.cpu().numpy())
        yield [(item, next(rows) if error is None else error) for item, error in chunk]
        chunk.clear()


def file_text(path: Path) -> str:
    """The text of a file; BadMedia if it cannot be read."""
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError, UserError) as error:
        raise BadMedia(f"no UTF-8 text: {error}") from None


def shown_name(path: Path | str) -> str:
    """A path as text. Bytes of its name that are not UTF-8 are escaped."""
    return str(path).encode(errors="backslashreplace").decode()
