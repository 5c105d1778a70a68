"""Finds files, hashes them, and keeps paths inside their folder."""

import glob
import io
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO

import fsspec

from openimp.common.cache import stable_hash
from openimp.common.digests import COMPARED_BYTES, digests
from openimp.common.errors import UserError, nearest, one_line
from openimp.common.folders import is_hidden
from openimp.common.modality import BadMedia
from openimp.common.names import BUNDLED, Name, is_url
from openimp.common.texts import valid_text

DEMO = Path(__file__).parent / "demo"
BUNDLED_LICENSES = {
    "clips.parquet": "MIT",
    "icons.parquet": "Apache-2.0, BSD-3-Clause, CC-BY-3.0, CC-BY-4.0, CC0-1.0, ISC, MIT, OFL-1.1, Unlicense",
    "notes.parquet": "MIT, parts CC0-1.0 or public domain",
    "stills.parquet": "Apache-2.0, CC-BY-4.0, MIT",
}
"""Licenses of the bundled data, by file. The NOTICE files name the makers."""

BLOCK = 2**18
"""Bytes that are read at once from a file that is read forward. Each lane of a stream has a file open."""
READ_AHEAD = 2**22
"""Bytes that fsspec requests at once. Some file systems would request, and hold, 50 MB per file."""


def is_utf8(name: str) -> bool:
    """Whether a file's name is valid UTF-8, as Arrow requires. Python represents other bytes as lone surrogates."""
    return valid_text(name) == name


def locate(name: str, path: str) -> tuple[Path, list[str]]:
    """The folder `path` of a source, or else its `folder_of_pattern`, and the files that it matches, sorted.

    For a URL, the folder has no meaning.
    """
    if is_url(path):
        return Path(), _matching_urls(name, path)
    scheme, file_name = Name.parse(path)
    if scheme == BUNDLED:
        bundled = [file.name for file in DEMO.iterdir()]
        if file_name not in bundled:
            raise UserError(f"source {name}: openimp has no bundled data {file_name!r}{nearest(file_name, bundled)}")
        path = str(DEMO / file_name)
    if os.path.isdir(path):
        return Path(path), [path]
    files = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    if not files:  # The folder may be called "birds [2]".
        files = sorted(glob.glob(path.replace("[", "[[]"), recursive=True))
    if not files:
        hint = f"; if it has moved: openimp train and eval take --set sources.{name}.path=PLACE"
        if "{" in path:
            hint = "; braces are no pattern, but * is"
        elif glob.has_magic(path):
            hint = ""
        raise UserError(f"source {name}: {path}: no such file or folder{hint}")
    for file in files:
        if not os.path.isfile(file):
            raise UserError(f"source {name}: {file}: is not a regular file")
    return folder_of_pattern(path), files


def folder_of_pattern(path: str) -> Path:
    """The folder of a file or, for a pattern, the last folder before its first wildcard.

    It is the last one that exists: what has a wildcard names no folder, unless its brackets are part of its name, as in
    "birds [2]".
    """
    return next(folder for folder in Path(path).parents if folder.is_dir())


def _matching_urls(name: str, url: str) -> list[str]:
    if "*" not in url:
        return [url]
    try:
        system, path = fsspec.core.url_to_fs(url)
        files = sorted(system.glob(path))
        base = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
        if not is_hidden(path.removeprefix(base)):  # As `glob.glob` does for files on disk.
            files = [file for file in files if not is_hidden(file.removeprefix(base))]
    except Exception as error:  # Each file system raises its own errors.
        raise UserError(f"source {name}: {url}: {str(error).strip() or type(error).__name__}") from None
    if not files:
        raise UserError(f"source {name}: {url}: nothing there matches")
    return [system.unstrip_protocol(file) for file in files]


def open_forward(file: str) -> IO[bytes]:
    """Opens a local file or a URL to read it forward, so that each of its bytes is fetched once."""
    if not is_url(file):
        return open(file, "rb", buffering=BLOCK)
    with _os_errors():
        system, path = fsspec.core.url_to_fs(file)
        opened = system.open(path, "rb", block_size=READ_AHEAD)
        return _RemoteFile(opened, BLOCK)


class _RemoteFile(io.BufferedReader):
    """A file at a URL."""

    def read(self, size: int | None = -1) -> bytes:
        with _os_errors():
            return super().read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with _os_errors():
            return super().seek(offset, whence)


@contextmanager
def _os_errors() -> Iterator[None]:
    """Converts all errors of a file system to OSErrors. A ValueError, for example, would mean a damaged tar."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {one_line(error)}") from error


_real_folder = lru_cache(maxsize=64)(os.path.realpath)


def inside(root: Path, path: str) -> Path:
    """Resolves links and `..` in `path`, which is relative to `root` and must not leave it.

    Only a regular file is accepted, because reading a pipe would never end. Letters with accents may be encoded in
    another way than in the file's name: files from macOS have them decomposed.
    """
    if "://" in path:  # So `datasets` names a file in a zip, and of a streamed data set.
        advice = "download the file, unpack the archive, leave out stream, or store bytes in Parquet files"
        raise BadMedia(f"{path} is no file on this machine; {advice}")
    shown_path = f"{path:.300}"  # It may be base64.
    try:
        # Not as Path objects, which take longer to resolve and to compare. This is called for each example.
        folder = str(root)
        real_root = _real_folder(folder) if os.path.isabs(folder) else os.path.realpath(folder)
        real_path = os.path.realpath(os.path.join(real_root, path if path.isascii() else _as_on_disk(real_root, path)))
        if real_path != real_root and not real_path.startswith(os.path.join(real_root, "")):
            raise BadMedia(f"{shown_path} leaves the folder {root}")
        if not stat.S_ISREG(os.stat(real_path).st_mode):
            raise BadMedia(f"{shown_path} is not a regular file")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        hint = "; write / instead of \\" if os.sep == "/" and "\\" in path else ""  # Windows' paths
        raise BadMedia(f"{shown_path}: {getattr(error, 'strerror', None) or error} in {root}{hint}") from None
    return Path(real_path)


def _as_on_disk(folder: str, path: str) -> str:
    """Writes each name in `path` in the Unicode form (NFC or NFD) in which it exists; other names stay as they are."""
    found = folder
    for name in Path(path).parts:
        forms = (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))
        existing = (form for form in forms if os.path.lexists(os.path.join(found, form)))
        found = os.path.join(found, next(existing, name))
    return found


def fingerprint(base: Path, files: Sequence[str | Path], whole: bool) -> str:
    """Hash of the files' relative names and contents. It does not change if the folder is moved.

    Unless `whole`, at most `COMPARED_BYTES` are read: of each file its share, as `digests` spreads it.
    """
    most = None if whole else COMPARED_BYTES // max(1, len(files))
    return stable_hash((os.path.relpath(file, base), digest) for file, digest in zip(files, digests(files, most)))
