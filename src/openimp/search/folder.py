"""The folder of an index, its lock and its JSON files.

index.json     the model, and a fingerprint of its weights and views
skipped.json   files that could not be read, so that they are tried again only after they change
items.lance/   a LanceDB table with one row per item
.lock          held by the process that writes the index
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from openimp.common.errors import UserError
from openimp.common.safe_files import read_text, refuse_links, write_text
from openimp.common.schema import Count, Strict, checked

FORMAT = 3
"""Version of this layout. Format 2 is lifted if its search is exact."""
METADATA, SKIPPED, LOCK = "index.json", "skipped.json", ".lock"
INDEX_FILES = ("**/*",)
"""Patterns of the files of an index, for `refuse_links`."""
MAX_JSON = 2**28
"""Most bytes of `skipped.json` that are read."""


class Metadata(Strict):
    """The content of index.json."""

    format: Count
    """`FORMAT`."""
    model: str
    """The model that built the index, as `openimp.load` takes it."""
    fingerprint: str
    """Hash of the model's weights and views."""
    towards: dict[str, str]
    """By modality, the other modality that the vectors of its items can be compared with (in a disjoint space)."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Creates the folder of an index and keeps other writers out."""
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / LOCK).exists())):
        raise UserError(f"{folder}: is not an index; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    refuse_links(folder, INDEX_FILES)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{folder}: is being written by another process") from None
    try:
        yield
    finally:
        lock.release()


def read_metadata(folder: Path) -> Metadata | None:
    """The content of index.json; None if the folder has none."""
    file = folder / METADATA
    if not file.exists():
        return None
    found = _read_json(file)
    if isinstance(found, dict) and found.get("format") == 2 and found.pop("ivf", None) is None:
        found["format"] = FORMAT  # Only an approximate search had another form.
    if isinstance(found, dict) and (version := found.get("format")) != FORMAT:
        raise UserError(
            f"{file}: format {version}, and this version of openimp reads format {FORMAT}; make a new index"
        )
    return checked(Metadata, found, str(file))


def write_metadata(folder: Path, about: Metadata) -> None:
    """Writes index.json."""
    write_text(folder / METADATA, about.model_dump_json(indent=1))


def read_skipped(folder: Path) -> dict[str, tuple[str, str]]:
    """By path, the state (see `file_state`) of each file that could not be read, and the reason."""
    file = folder / SKIPPED
    found = _read_json(file) if file.exists() else {}
    if not isinstance(found, dict) or not all(isinstance(value, list) and len(value) == 2 for value in found.values()):
        raise UserError(f"{file}: damaged: expected an object with pairs")
    return {path: (str(state), str(reason)) for path, (state, reason) in found.items()}


def write_skipped(folder: Path, skipped: dict[str, tuple[str, str]]) -> None:
    """Writes skipped.json."""
    write_text(folder / SKIPPED, json.dumps(skipped, indent=1))


def _read_json(file: Path) -> Any:
    try:
        return json.loads(read_text(file, MAX_JSON))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged: {error}") from None
