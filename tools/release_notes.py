"""Prints the section of CHANGELOG.md about a version. The version must be that of the package.

python -m tools.release_notes 0.1.0
"""

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version")
    version = parser.parse_args().version
    packaged = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    if packaged is None or packaged[1] != version:
        raise SystemExit(f"the tag is for version {version}, but pyproject.toml has {packaged and packaged[1]}")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    section = re.search(rf"^## \[{re.escape(version)}\].*?\n(.*?)(?=^## \[|\Z)", changelog, re.MULTILINE | re.DOTALL)
    if section is None:
        raise SystemExit(f"CHANGELOG.md has no section about version {version}")
    print(section[1].strip())


if __name__ == "__main__":
    main()
