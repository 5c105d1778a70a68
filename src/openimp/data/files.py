"""Files: finding them, telling whether they changed, and keeping every path inside its folder."""

import glob
import hashlib
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from openimp.common.errors import UserError, nearest
from openimp.common.modality import BadMedia

DEMO = Path(__file__).parent / "demo"


def is_utf8(name: str) -> bool:
    """Whether a file's name is UTF-8, as Arrow's strings are; what is not, Python holds as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def is_url(path: str) -> bool:
    """Whether `path` is for fsspec to open, such as `s3://bucket/*.parquet`."""
    return "://" in path


def locate(name: str, path: str) -> tuple[Path, list[str]]:
    """The folder that a source's `path` starts at and the files that it names, sorted, for `*` may name many.

    The folder is the part before the first `*`, or a single file's own; of a URL it means nothing.

    Raises:
        UserError: there is none.
    """
    if is_url(path):
        return Path(), _matching_urls(name, path)
    if path.startswith("openimp:"):
        wanted = path.removeprefix("openimp:")
        bundled = [file.name for file in DEMO.iterdir()] if DEMO.is_dir() else []
        if wanted not in bundled:
            raise UserError(f"source {name}: openimp has no bundled data {wanted!r}{nearest(wanted, bundled)}")
        path = str(DEMO / wanted)
    if os.path.exists(path):
        if not (os.path.isdir(path) or os.path.isfile(path)):
            raise UserError(f"source {name}: {path}: is not a regular file")
        return Path(path) if os.path.isdir(path) else Path(path).parent, [path]
    files = sorted(glob.glob(path, recursive=True))
    if not files:
        raise UserError(f"source {name}: {path}: no such file or folder")
    for file in files:
        if not os.path.isfile(file):
            raise UserError(f"source {name}: {file}: is not a regular file")
    return Path(re.split(r"[*?\[]", path)[0] + "_").parent, files


def _matching_urls(name: str, url: str) -> list[str]:
    if "*" not in url:
        return [url]
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
        found = sorted(system.glob(path))
    except Exception as error:  # Each file system has errors of its own.
        raise UserError(f"source {name}: {url}: {str(error).strip() or type(error).__name__}") from None
    if not found:
        raise UserError(f"source {name}: {url}: nothing there matches")
    return [system.unstrip_protocol(file) for file in found]


def inside(root: Path, path: str) -> Path:
    """`path`, relative to `root`, with links and `..` resolved.

    Raises:
        BadMedia: it leaves the folder, there is no such file, or it is not a regular file, because a pipe
            would hang the reader.
    """
    try:
        # realpath knows links; Path.resolve would do, at twice the time.
        found = Path(os.path.realpath(root / path))
        if not found.is_relative_to(os.path.realpath(root)):
            raise BadMedia(f"{path} leaves the folder {root}")
        if not stat.S_ISREG(found.stat().st_mode):
            raise BadMedia(f"{path} is not a regular file")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadMedia(f"{path}: {getattr(error, 'strerror', None) or error} in {root}") from None
    return found


def digest(file: str | Path, blocks: int = 64, block: int = 64 * 1024) -> str:
    """SHA-256 over a file's size and `blocks` blocks of bytes spread evenly over it, the first and last among them.

    So all of a file up to 4 MiB counts, and a terabyte takes no longer. In a larger file a change that keeps the size
    and falls between the blocks goes unseen.
    """
    size = os.path.getsize(file)
    total = hashlib.sha256(str(size).encode())
    with open(file, "rb") as handle:
        if size <= blocks * block:
            total.update(handle.read())
        else:
            for i in range(blocks):
                handle.seek(i * (size - block) // (blocks - 1))
                total.update(handle.read(block))
    return total.hexdigest()


def stable_hash(parts: Iterable[Any]) -> str:
    """One hexadecimal name of 32 digits for a sequence of values, by their `repr`."""
    total = hashlib.sha256()
    for part in parts:
        total.update(repr(part).encode() + b"\n")
    return total.hexdigest()[:32]


def fingerprint(base: Path, files: Iterable[str | Path]) -> str:
    """Names a set of files by content: relative names and digests, so it stays the same when the folder is moved."""
    return stable_hash((os.path.relpath(file, base), digest(file)) for file in files)
