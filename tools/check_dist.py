"""Checks what is published: the wheel and the source distribution in a folder.

    python -m build
    python -m tools.check_dist dist

The wheel must have everything that works without the repository, and nothing else. It lists the contents by folder.
"""

import argparse
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

LIMIT = 50 * 10**6
"""Most bytes of a file. The bundled data takes most of them."""
NEEDED_IN_WHEEL = {
    "openimp/py.typed",
    "openimp/recipes/demo.yaml",
    "openimp/studies/moe.yaml",
    "openimp/models/base/config.json",
    "openimp/data/demo/NOTICE",
    "openimp/search/static/search.css",
    "openimp/report/templates/page.html",
    "licenses/LICENSE",
    "licenses/src/openimp/data/demo/NOTICE",
}
"""Files that are not Python. Those of the folder of metadata are without its name, which has the version."""
NEEDED_IN_SOURCE = {"pyproject.toml", "README.md"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    (wheel,) = folder.glob("*.whl")
    (source,) = folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.compress_size for entry in archive.infolist()}
    with tarfile.open(source) as archive:
        source_names = {name.partition("/")[2] for name in archive.getnames()}
    wheel_names = sizes.keys() | {name.partition(".dist-info/")[2] for name in sizes}
    problems = [f"{wheel.name}: lacks {name}" for name in sorted(NEEDED_IN_WHEEL - wheel_names)]
    problems += [f"{source.name}: lacks {name}" for name in sorted(NEEDED_IN_SOURCE - source_names)]
    problems += [
        f"{wheel.name}: {name} is not a part of the package" for name in sizes if not name.startswith("openimp")
    ]
    by_folder: Counter[str] = Counter()
    for name, size in sizes.items():
        by_folder["/".join(name.split("/")[:2])] += size
    for name, size in by_folder.most_common(20):
        print(f"{size:12,} bytes  {name}")
    for file in (wheel, source):
        size = file.stat().st_size
        print(f"{size:12,} bytes  {file.name}")
        if size > LIMIT:
            problems.append(f"{file.name}: more than {LIMIT:,} bytes")
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
