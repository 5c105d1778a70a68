"""Checks what is published: the wheel and the source distribution in a folder.

    python -m build
    python tools/check_dist.py dist

The wheel must have everything that works without the repository, and nothing else. It lists the contents by folder.
"""

import argparse
import tarfile
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath

LIMIT = 50 * 10**6
"""Most bytes of a file. The bundled data takes most of them."""
NEEDED = (
    "openimp/py.typed",
    "openimp/recipes/demo.yaml",
    "openimp/studies/moe.yaml",
    "openimp/models/base/config.json",
    "openimp/data/demo/NOTICE",
    "openimp/search/static/search.css",
    "openimp/report/templates/page.html",
)
"""Files of the wheel that are not Python."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    (wheel,) = folder.glob("*.whl")
    (source,) = folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        sizes = {entry.filename: entry.compress_size for entry in archive.infolist()}
    with tarfile.open(source) as archive:
        source_names = {"/".join(PurePosixPath(name).parts[1:]) for name in archive.getnames()}
    problems = [f"{wheel.name}: lacks {name}" for name in NEEDED if name not in names]
    licenses = [name for name in names if ".dist-info/licenses/" in name]
    if not {"LICENSE", "NOTICE"} <= {PurePosixPath(name).name for name in licenses}:
        problems.append(f"{wheel.name}: lacks licenses")
    problems += [
        f"{wheel.name}: {name} is not a part of the package" for name in names if not name.startswith("openimp")
    ]
    problems += [f"{source.name}: lacks {name}" for name in ("pyproject.toml", "README.md") if name not in source_names]
    problems += [f"{file.name}: more than {LIMIT:,} bytes" for file in (wheel, source) if file.stat().st_size > LIMIT]
    by_folder: Counter[str] = Counter()
    for name, size in sizes.items():
        by_folder["/".join(PurePosixPath(name).parts[:2])] += size
    for name, size in by_folder.most_common(20):
        print(f"{size:12,} bytes  {name}")
    for file in (wheel, source):
        print(f"{file.stat().st_size:12,} bytes  {file.name}")
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
