"""Archives of public registries from which the bundled data is built."""

import io
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

from openimp.common.safe_files import sha256


def fetched(archive: Path, checksum: str, command: list[str]) -> Path:
    """Returns the archive. If it is missing, the command downloads it into its folder first. Checks its SHA-256."""
    if not archive.exists():
        subprocess.run(command, cwd=archive.parent, check=True)
    if (found := sha256(archive)) != checksum:
        raise SystemExit(f"{archive} has sha256 {found}, expected {checksum}: delete it and run again")
    return archive


def members(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yields (path, content) of the regular files of a .tgz or .deb whose path matches the pattern."""
    packed = archive.read_bytes()
    if archive.suffix == ".deb":
        packed = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        for member in tar:
            if member.isfile() and re.search(pattern, member.name):
                yield member.name, tar.extractfile(member).read()  # type: ignore[union-attr]
